// Heads as a map, layer by head: at all positions together, or at the one that is chosen.

// holder: the element that the map stands in; pick(label) chooses a head. Returns draw(isAnew)
function headsMap({ view, sheet, model, holder, pick }) {
  const { totals, at, filter } = model;
  const count = Math.max(...view.groups.map((group) => group.rows.length));
  const lines = (where) => [
    `Heads${where}: ${sheet.headline}`,
    view.adds
      ? `all heads sum to ${valueText(sheet)}`
      : (sheet.own_sums ?? `the heads of every layer and the rest sum to ${valueText(sheet)}`),
    ...warningsOf(sheet),
  ];
  const chosen = () => {
    const found = /^L(\d+)H(\d+)$/.exec(state.get("head") ?? "");
    return found ? [Number(found[1]), Number(found[2])] : [filter().layer, null];
  };
  const choose = (layer, head) => {
    if (layer === null) state.set({ head: null });
    else if (canPick("heads", view)) pick(`L${layer}H${head}`);
    else state.set({ layer: state.number("layer") === layer ? null : layer });
  };
  const make = (position) => {
    const share = (label) => (position === null ? totals.get(label) : (at(label, position) ?? null));
    const value = (row, column) => {
      const label = `L${row.key}H${column.key}`;
      return totals.has(label) ? share(label) : null;
    };
    const largest = sizeOf(view.groups.flatMap((group) => group.rows.map(([label]) => share(label) ?? 0)));
    const format = formatter(largest, sheet.unit);
    const where = position === null ? "" : ` at position ${position}`;
    return heatMap({
      id: "heads-map",
      label: `Heads: layer by head${where}`,
      unit: sheet.unit,
      largest,
      value,
      columns: Array.from({ length: count }, (_, i) => ({ key: i, text: String(i) })),
      rows: view.groups.map((group) => ({ key: group.layer, text: String(group.layer) })),
      describe: (row, column) => `head L${row.key}H${column.key}${where}, share ${format(value(row, column) ?? 0)}`,
      chosen,
      pick: choose,
      xTitle: "head",
      yTitle: "layer",
      width: () => Math.max(220, holder.clientWidth),
      lines: () => lines(where),
    });
  };
  let grid = null,
    drawnFor = null;
  return (isAnew = false) => {
    const { position } = filter();
    if (!isAnew && String(position) === drawnFor) return grid.mark();
    drawnFor = String(position);
    grid = make(position);
    holder.replaceChildren(h("div", { class: "tools" }, ...exportButtonsOf("heads-map")), grid.element);
    grid.draw();
  };
}
