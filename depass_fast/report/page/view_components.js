// Components in a table: heads, neurons, features or any others; heads also as a map. What was chosen before filters them.

const PARTS = { heads: "attention", neurons: "mlp" };

views.components = (view, sheet, page) => {
  const kind = view.id,
    own = kind === "heads" ? "head" : "neuron",
    isLayered = view.groups.length > 1;
  const map = page.sheet.views.find((one) => one.kind === "map");
  const part = map?.parts.find((one) => one.name === PARTS[kind]);
  const byLayer = new Map(view.groups.map((group) => [group.layer, group]));
  const total = new Map(view.groups.flatMap((group) => group.rows));
  for (const [label, units] of Object.entries(view.totals ?? {})) total.set(label, units);
  const placesOf = (label) => pairs(view.places?.[label]);
  const readings = view.readings ?? {};

  // which layer and position hold here: those of the map, unless they were chosen in its other part
  const filter = () => {
    const part = state.get("part"),
      mine = !map || part === PARTS[kind] || !Object.values(PARTS).includes(part);
    const layer = mine ? state.number("layer") : null;
    return { layer: byLayer.has(layer) ? layer : null, position: view.places ? state.number("position") : null };
  };
  const cellTotal = (layer, position) => {
    const i = map?.positions.indexOf(position) ?? -1,
      row = part?.rows.find((one) => one.layer === layer);
    return i < 0 || !row ? null : row.cells[i];
  };
  const at = (label, position) => placesOf(label).find(([n]) => n === position)?.[1];

  // the rows that are shown, what stands under them, and the sum where there is one
  const selection = () => {
    const { layer, position } = filter(),
      head = kind === "neurons" ? state.get("head") : null;
    if (head && Object.keys(readings).length) {
      const rows = Object.entries(readings).flatMap(([label, one]) =>
        one.writers.filter(([writer]) => writer === head).map(([, units]) => ({ label, units })),
      );
      return {
        rows,
        foot: [],
        total: null,
        note: `Neurons that read ${head} directly, by what they take from it. ${
          Object.keys(readings).length
        } leading neurons were looked at.`,
        filtered: `read from ${head}`,
      };
    }
    if (position !== null) {
      const rows = Object.keys(view.places)
        .filter((label) => layer === null || layerOf(label) === layer)
        .map((label) => ({ label, units: at(label, position) }))
        .filter((row) => row.units !== undefined);
      const sum = layer === null ? null : cellTotal(layer, position);
      const where = `${tokenName(sheet, position)} at position ${position}`;
      const left = sum === null ? 0 : sum - sumOf(rows.map((row) => row.units));
      return {
        rows,
        total: sum,
        totalName: `${part?.title ?? "all"} of layer ${layer} here`,
        isCell: true,
        foot: sum !== null && left !== 0 ? [{ label: "others", units: left, isRounding: true }] : [],
        note:
          sum === null
            ? `${layer === null ? "All layers" : `Layer ${layer}`}, ${where}. ${
                layer === null
                  ? "Layers overlap: choose one to see its sum."
                  : "The position is among the others of the map."
              }`
            : `Layer ${layer}, ${where}.`,
        filtered: where,
      };
    }
    if (layer === null && view.adds) {
      const foot = ["rest", "bias"]
        .filter((name) => view.groups.some((one) => one[name] !== null))
        .map((name) => ({ label: name, units: sumOf(view.groups.map((one) => one[name] ?? 0)) }));
      return {
        rows: view.groups.flatMap((one) => one.rows.map(([label, units]) => ({ label, units }))),
        foot,
        total: sumOf(view.groups.map((one) => one.total)),
        note: "",
      };
    }
    const group = layer === null && isLayered ? null : (byLayer.get(layer) ?? view.groups[0]);
    if (group) {
      return {
        rows: group.rows.map(([label, units]) => ({ label, units })),
        foot: footOf(group),
        total: group.total,
        group,
        note: group.layer === null ? "" : `Layer ${group.layer}.`,
        filtered: layer === null ? null : `layer ${layer}`,
      };
    }
    return {
      rows: view.groups.flatMap((one) => one.rows.map(([label, units]) => ({ label, units }))),
      foot: [],
      total: null,
      note: "Of all layers. Layers overlap: choose one to see its sum.",
    };
  };

  const left = h("div", { class: "side" }),
    right = h("div", { class: "side" }),
    details = h("div", { class: "details", "aria-live": "polite" });
  const note = h("p", { class: "note" }),
    sums = h("div", { class: "sums" });
  const find = h("input", {
    type: "search",
    placeholder: "Filter by name",
    "aria-label": `Filter ${kind} by name`,
    value: state.get(`find.${kind}`) ?? "",
    oninput: () => state.set({ [`find.${kind}`]: find.value.trim() }),
  });
  const layers = !isLayered
    ? null
    : h(
        "select",
        {
          "aria-label": `Layer of the ${kind}`,
          onchange: (event) =>
            state.set({
              layer: event.target.value,
              part: map && event.target.value ? PARTS[kind] : null,
            }),
        },
        h("option", { value: "" }, "All layers"),
        ...view.groups.map((group) => h("option", { value: group.layer }, `Layer ${group.layer}`)),
      );
  const pick = canPick(kind, view)
    ? (label) => state.set({ [own]: state.get(own) === label ? null : label })
    : (label) => choosing(label, map, view)?.();
  const isChosen = (label) => label === state.get(own) || label.endsWith(`'@${state.get("position")}`);
  const fill = () => {
    const chosen = selection(),
      text = find.value.trim().toLowerCase();
    const rows = chosen.rows.filter((row) => row.label.toLowerCase().includes(text));
    const hidden = chosen.rows.filter((row) => !row.label.toLowerCase().includes(text));
    const foot =
      hidden.length && chosen.total !== null
        ? [{ label: `${hidden.length} filtered out`, units: sumOf(hidden.map((row) => row.units)) }, ...chosen.foot]
        : chosen.foot;
    note.textContent = chosen.note;
    if (layers) layers.value = filter().layer ?? "";
    right.replaceChildren(
      h("div", { class: "filters" }, ...[layers, find].filter(Boolean)),
      shareTable({
        id: kind,
        caption: `${view.title}. ${chosen.note}`,
        rows,
        foot,
        total: chosen.total,
        totalName: chosen.totalName ?? "sum",
        sheet,
        pick: (row) => pick(row.label),
        canPick: (row) => canPick(kind, view) || choosing(row.label, map, view) !== null,
        isPicked: (row) => isChosen(row.label),
        lines: () => [`${view.title}: ${sheet.headline}`, ...(chosen.note ? [chosen.note] : [])],
      }),
    );
    const listed = {
      label: `${chosen.rows.length} listed`,
      units: sumOf(chosen.rows.map((row) => row.units)),
      always: true,
    };
    sums.replaceChildren(
      chosen.total === null
        ? manySums(
            view.groups.map((group) => group.total),
            sheet,
          )
        : sumLine(
            [listed, ...chosen.foot],
            chosen.total,
            sheet,
            chosen.isCell ? { name: chosen.totalName } : sumOfGroup(chosen),
          ),
    );
    find.hidden = chosen.rows.length < 12 && !text;
  };

  const sumOfGroup = (chosen) =>
    view.adds && chosen.group
      ? { name: `layer ${chosen.group.layer}` }
      : { value: sheet.own_sums && chosen.group ? null : sheet.value };

  let grid = null,
    drawnFor = null;
  const columnCount = kind === "heads" && isLayered ? Math.max(...view.groups.map((group) => group.rows.length)) : 0;
  const drawGrid = () => {
    const { position } = filter();
    if (String(position) === drawnFor) return grid.mark();
    drawnFor = String(position);
    const value = (row, column) => {
      const label = `L${row.key}H${column.key}`;
      if (!total.has(label)) return null;
      return position === null ? total.get(label) : (at(label, position) ?? null);
    };
    const largest = sizeOf(
      view.groups.flatMap((group) =>
        group.rows.map(([label, units]) => (position === null ? units : (at(label, position) ?? 0))),
      ),
    );
    const format = formatter(largest, sheet.unit);
    const where = position === null ? "" : ` at position ${position}`;
    grid = heatMap({
      id: "heads-map",
      label: `Heads: layer by head${where}`,
      unit: sheet.unit,
      largest,
      value,
      columns: Array.from({ length: columnCount }, (_, i) => ({ key: i, text: String(i) })),
      rows: view.groups.map((group) => ({ key: group.layer, text: String(group.layer) })),
      describe: (row, column) => `head L${row.key}H${column.key}${where}, share ${format(value(row, column) ?? 0)}`,
      chosen: () => {
        const found = /^L(\d+)H(\d+)$/.exec(state.get("head") ?? "");
        return found ? [Number(found[1]), Number(found[2])] : [filter().layer, null];
      },
      pick: (layer, head) =>
        layer === null
          ? state.set({ head: null })
          : canPick(kind, view)
            ? pick(`L${layer}H${head}`)
            : state.set({ layer: state.number("layer") === layer ? null : layer }),
      xTitle: "head",
      yTitle: "layer",
      width: () => Math.max(220, left.clientWidth),
      lines: () => [
        `Heads${where}: ${sheet.headline}`,
        view.adds
          ? `all heads sum to ${valueText(sheet)}`
          : (sheet.own_sums ?? `the heads of every layer and the rest sum to ${valueText(sheet)}`),
        ...warningsOf(sheet),
      ],
    });
    left.replaceChildren(h("div", { class: "tools" }, ...exportButtonsOf("heads-map")), grid.element);
    grid.draw();
  };

  const small = (id, caption, head, rows, foot, sum) =>
    h(
      "section",
      { class: "detail" },
      h("h4", {}, caption),
      shareTable({
        id,
        caption,
        head,
        rows,
        foot,
        pick: (row) => choosing(row.label, map)(),
        canPick: (row) => choosing(row.label, map) !== null,
        isPicked: () => false,
        total: sum,
        sheet,
        lines: () => [`${caption}: ${sheet.headline}`],
        most: 8,
      }),
    );
  const byPosition = (list) => list.map(([n, units]) => ({ label: `${tokenName(sheet, n)}@${n}`, units }));
  const remainder = (rows, whole, what = "others") => {
    const gone = whole - sumOf(rows.map((row) => row.units));
    return gone ? [{ label: what, units: gone, isRounding: true }] : [];
  };
  const explain = () => {
    const label = state.get(own),
      whole = total.get(label ?? "");
    if (!label || whole === undefined || !canPick(kind, view)) return details.replaceChildren();
    const writes = byPosition(placesOf(label)),
      carries = byPosition(pairs(view.sources?.[label])),
      reading = readings[label];
    const found = [];
    if (carries.length)
      found.push(small(`${kind}-from`, "Carries from", "Position", carries, remainder(carries, whole), whole));
    if (writes.length)
      found.push(small(`${kind}-at`, "Writes at", "Position", writes, remainder(writes, whole), whole));
    if (reading) {
      const rows = reading.writers.map(([name, units]) => ({ label: name, units }));
      const others = reading.others[0] ? [{ label: `${reading.others[0]} others`, units: reading.others[1] }] : [];
      const bias = reading.bias ? [{ label: "bias", units: reading.bias }] : [];
      found.unshift(
        small(
          `${kind}-reads`,
          `Reads at ${tokenName(sheet, reading.position)}@${reading.position}`,
          "Written by",
          rows,
          [...others, ...bias],
          reading.share,
        ),
      );
    }
    const owed = view.owed?.[label];
    if (owed)
      found.push(
        small(
          `${kind}-owed`,
          "Owed to",
          "Component",
          owed.rows.map(([name, units]) => ({ label: name, units })),
          footOf(owed),
          owed.total,
        ),
      );
    details.replaceChildren(h("h3", {}, bdi(label)), h("div", { class: "columns" }, ...found));
  };

  page.whenShown.push(() =>
    reacting(page, ["layer", "position", "part", "head", "neuron", `find.${kind}`], () => {
      if (document.activeElement !== find) find.value = state.get(`find.${kind}`) ?? "";
      fill();
      explain();
      if (columnCount) drawGrid();
    }),
  );
  page.whenResized.push(() => {
    if (columnCount) {
      drawnFor = null;
      drawGrid();
    }
  });
  return card(
    { id: kind, title: view.title, lead: view.lead ?? "" },
    note,
    h("div", { class: columnCount ? "columns" : "single" }, ...(columnCount ? [left] : []), right),
    sums,
    details,
  );
};

// what a click on a component chooses in other views, or null: a token its position, a module its layer, a head itself
function choosing(label, map, self = null) {
  const [, layer, head] = /^L(\d+)(?:H(\d+)|\.(?:attn|mlp))$/.exec(label) ?? [],
    position = /'@(\d+)$|"@(\d+)$/.exec(label);
  const toggle = (changes) => () =>
    state.set(
      Object.entries(changes).every(([key, value]) => state.get(key) === String(value))
        ? Object.fromEntries(Object.keys(changes).map((key) => [key, null]))
        : changes,
    );
  if (position && map) return toggle({ position: Number(position[1] ?? position[2]) });
  if (head !== undefined) return self ? null : toggle({ head: label });
  if (layer === undefined || !map) return null;
  const part = label.endsWith(".mlp") ? "mlp" : "attention";
  return toggle({ layer: Number(layer), part: map.parts.some((one) => one.name === part) ? part : null });
}

const canPick = (kind, view) => Boolean(view.places ?? view.owed) && (kind === "heads" || kind === "neurons");

// [n, units, n, units, ...] as pairs
const pairs = (flat = []) => Array.from({ length: flat.length / 2 }, (_, i) => [flat[2 * i], flat[2 * i + 1]]);
