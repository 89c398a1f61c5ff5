// Components in a table: heads, neurons, features or any others; heads also as a map. What was chosen filters them.

views.components = (view, sheet, page) => {
  const kind = view.id,
    own = ownKey(kind),
    filterKey = `find.${kind}`;
  const model = componentRows(view, sheet, page),
    { map, isLayered } = model;
  const found = componentDetails(view, sheet, model);
  const pick = canPick(kind, view)
    ? (label) => state.set(state.get(own) === label ? { [own]: null } : { [own]: label, ...freed(own) })
    : (label) => choosing(label, map, view)?.();
  const isChosen = (label) => label === state.get(own) || label.endsWith(`'@${state.get("position")}`);

  const find = findBox(filterKey, kind);
  const layers = isLayered ? layerSelect(view, map ? PARTS[kind] : null) : null;
  const ranking = h("div"),
    sums = h("div", { class: "sums" }),
    note = h("p", { class: "note" }),
    details = h("div", { class: "details", "aria-live": "polite" });
  const left = h("div", { class: "side" }),
    right = h("div", { class: "side" }, h("div", { class: "filters" }, ...[layers, find].filter(Boolean)), ranking);

  const tableOf = (chosen, rows, foot) =>
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
    });
  const sumOfGroup = ({ group }) =>
    view.adds && group ? { name: `layer ${group.layer}` } : { value: sheet.own_sums && group ? null : sheet.value };
  const sumsOf = (chosen, rows, foot) => {
    if (chosen.says) return h("p", { class: "sum muted" }, chosen.says);
    if (chosen.total === null) {
      const totals = view.groups.map((group) => group.total);
      return manySums(totals, sheet);
    }
    const shown = { label: `${written(rows.length)} listed`, units: sumOf(rows.map((row) => row.units)), always: true };
    return sumLine(
      [shown, ...foot],
      chosen.total,
      sheet,
      chosen.isOwn ? { name: chosen.totalName } : sumOfGroup(chosen),
    );
  };
  const fill = () => {
    const chosen = model.selection(),
      text = find.value.trim().toLowerCase();
    const isFound = (row) => row.label.toLowerCase().includes(text);
    const rows = chosen.rows.filter(isFound),
      hidden = chosen.rows.filter((row) => !isFound(row));
    const out = { label: `${written(hidden.length)} filtered out`, units: sumOf(hidden.map((row) => row.units)) };
    const foot = hidden.length && chosen.total !== null ? [out, ...chosen.foot] : chosen.foot;
    note.textContent = chosen.note;
    if (layers) {
      layers.value = model.filter().layer ?? "";
      layers.hidden = model.readHead() !== null; // readers of a head are of all layers
    }
    find.hidden = chosen.rows.length < 12 && !text && document.activeElement !== find;
    ranking.replaceChildren(tableOf(chosen, rows, foot));
    sums.replaceChildren(sumsOf(chosen, rows, foot));
  };

  const hasMap = kind === "heads" && isLayered;
  const drawMap = hasMap ? headsMap({ view, sheet, model, holder: left, pick }) : null;
  page.whenShown.push(() =>
    reacting(page, ["layer", "position", "part", "head", "neuron", filterKey], () => {
      if (document.activeElement !== find) find.value = state.get(filterKey) ?? "";
      fill();
      details.replaceChildren(...found());
      drawMap?.();
    }),
  );
  page.whenResized.push(() => drawMap?.(true));
  return card(
    { id: kind, title: view.title, lead: view.lead ?? "" },
    note,
    h("div", { class: hasMap ? "columns" : "single" }, ...(hasMap ? [left] : []), right),
    sums,
    details,
  );
};

// the box that filters a table by name, as the address says
function findBox(key, what) {
  const box = h("input", {
    type: "search",
    placeholder: "Filter by name",
    "aria-label": `Filter ${what} by name`,
    value: state.get(key) ?? "",
    oninput: () => state.set({ [key]: box.value.trim() }),
  });
  return box;
}

const layerSelect = (view, part) =>
  h(
    "select",
    {
      "aria-label": `Layer of the ${view.id}`,
      onchange: (event) => state.set({ layer: event.target.value, part: event.target.value ? part : null }),
    },
    h("option", { value: "" }, "All layers"),
    ...view.groups.map((group) => h("option", { value: group.layer }, `Layer ${group.layer}`)),
  );

// a head's readers are of all layers: its choice takes back that of a layer's MLP
const freed = (own) => (own === "head" && state.get("part") === PARTS.neurons ? { layer: null, part: null } : {});
