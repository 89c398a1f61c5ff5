// What is known of the component that is chosen: where it writes, what it carries or reads, what it owes; and what a
// click on any component chooses.

function componentDetails(view, sheet, model) {
  const { map } = model,
    kind = view.id,
    own = ownKey(kind);
  const small = ({ id, caption, head, rows, foot, total }) =>
    h(
      "section",
      { class: "detail" },
      h("h4", {}, caption),
      shareTable({
        id: `${kind}-${id}`,
        caption,
        head,
        rows,
        foot,
        pick: (row) => choosing(row.label, map)(),
        canPick: (row) => choosing(row.label, map) !== null,
        isPicked: () => false,
        total,
        sheet,
        lines: () => [`${caption}: ${sheet.headline}`],
        most: 8,
      }),
    );
  const byPosition = (id, caption, list, total) => {
    const rows = list.map(([n, units]) => ({ label: `${tokenName(sheet, n)}@${n}`, units }));
    const left = total - sumOf(rows.map((row) => row.units));
    const foot = left ? [{ label: "others", units: left, isRounding: true }] : [];
    return list.length ? small({ id, caption, head: "Position", rows, foot, total }) : null;
  };
  const reads = (reading) => {
    if (!reading) return null;
    const others = reading.others[0] ? [{ label: counted(reading.others[0], "other"), units: reading.others[1] }] : [];
    const bias = reading.bias ? [{ label: "bias", units: reading.bias }] : [];
    return small({
      id: "reads",
      caption: `Reads at ${tokenName(sheet, reading.position)}@${reading.position}`,
      head: "Written by",
      rows: rowsOf(reading.writers),
      foot: [...others, ...bias],
      total: reading.share,
    });
  };
  const owes = (owed) =>
    owed
      ? small({
          id: "owed",
          caption: "Owed to",
          head: "Component",
          rows: rowsOf(owed.rows),
          foot: footOf(owed),
          total: owed.total,
        })
      : null;
  // what the page does not hold of a component is said: it holds the leading ones
  const missing = (label) => {
    const said = [];
    if (kind === "neurons" && view.readings && !model.readings[label])
      said.push(
        `What it reads is not on the page, which holds that of the ` +
          `${counted(Object.keys(model.readings).length, "leading neuron")}.`,
      );
    if (view.places && !model.placesOf(label).length)
      said.push("Where it writes is not on the page, which holds the largest shares at single positions.");
    if (view.owed && !view.owed[label]) said.push("What its credit is owed to is known of the leading heads only.");
    return said.length ? h("p", { class: "note" }, said.join(" ")) : null;
  };
  // the parts of the details of the chosen component; none where none is chosen
  return () => {
    const label = state.get(own),
      total = model.totals.get(label ?? "");
    if (!label || total === undefined || !canPick(kind, view)) return [];
    const found = [
      reads(model.readings[label]),
      byPosition("from", "Carries from", pairs(view.sources?.[label]), total),
      byPosition("at", "Writes at", model.placesOf(label), total),
      owes(view.owed?.[label]),
    ];
    return [h("h3", {}, bdi(label)), missing(label), h("div", { class: "columns" }, ...found.filter(Boolean))].filter(
      Boolean,
    );
  };
}

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

const ownKey = (kind) => (kind === "heads" ? "head" : "neuron");
const canPick = (kind, view) => Boolean(view.places ?? view.owed) && (kind === "heads" || kind === "neurons");
