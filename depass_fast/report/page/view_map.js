// Layers by positions: what attention and the MLP of every layer write at every position.

const MOST_COLUMNS = 64;

views.map = (view, sheet, page) => {
  const place = new Map(view.positions.map((position, i) => [position, i]));
  const sizes = view.positions.map((_, i) =>
    sumOf(view.parts.flatMap((part) => part.rows.map((row) => Math.abs(row.cells[i])))),
  );
  const leading = view.positions
    .map((_, i) => i)
    .sort((a, b) => sizes[b] - sizes[a])
    .slice(0, MOST_COLUMNS);
  const largest = sizeOf(view.parts.flatMap((part) => part.rows.flatMap((row) => row.cells)));
  const format = formatter(largest, sheet.unit);
  const holder = h("div", { class: "maps" }),
    sums = h("div", { class: "sums" });
  const textOf = (position) => `${tokenName(sheet, position)}@${position}`;
  let grids = [],
    drawnFor = null;

  const columnsNow = () => {
    const chosen = place.get(state.number("position"));
    const shown = new Set(chosen === undefined ? leading : [...leading, chosen]);
    const kept = [...shown].sort((a, b) => a - b);
    const count = view.positions.length - kept.length + view.left;
    return [
      ...kept.map((i) => ({ key: view.positions[i], text: textOf(view.positions[i]), i })),
      ...(count ? [{ key: "others", text: counted(count, "other"), kept }] : []),
    ];
  };
  const cellOf = (row, column) =>
    column.kept ? row.others[1] + sumOf(row.cells) - sumOf(column.kept.map((i) => row.cells[i])) : row.cells[column.i];

  const build = () => {
    const columns = columnsNow();
    const name = columns.map((column) => column.key).join();
    if (name === drawnFor) return grids.forEach((grid) => grid.mark());
    drawnFor = name;
    grids = view.parts.map((part) => {
      const byLayer = new Map(part.rows.map((row) => [row.layer, row]));
      return heatMap({
        id: `map-${part.name}`,
        label: `${part.title}: layer by position`,
        columns,
        direction: sheet.direction,
        unit: sheet.unit,
        largest,
        rows: part.rows.map((row) => ({ key: row.layer, text: String(row.layer) })),
        value: (row, column) => cellOf(byLayer.get(row.key), column),
        describe: (row, column) =>
          [
            `${part.title} of layer ${row.key}`,
            column.kept ? column.text : `${tokenName(sheet, column.key)} at position ${column.key}`,
            `share ${format(cellOf(byLayer.get(row.key), column))}`,
          ].join(", "),
        chosen: () => [
          state.get("part") === null || state.get("part") === part.name ? state.number("layer") : null,
          state.number("position"),
        ],
        pick: (layer, position) =>
          layer === null
            ? state.set({ layer: null, part: null, position: null })
            : state.set({
                layer,
                part: part.name,
                position: position === "others" ? null : position,
                head: null,
                neuron: null,
              }),
        xTitle: "position",
        yTitle: "layer",
        width: () =>
          Math.max(
            240,
            (holder.clientWidth - (holder.clientWidth > 860 ? 40 : 0)) /
              (holder.clientWidth > 860 ? view.parts.length : 1),
          ),
        lines: () => [
          `${part.title}: ${view.what}, ${sheet.headline}`,
          sheet.own_sums ?? `in every layer, these shares and the rest sum to ${valueText(sheet)}`,
          ...warningsOf(sheet),
        ],
      });
    });
    holder.replaceChildren(
      ...view.parts.map((part, i) =>
        h(
          "section",
          { class: "map", "aria-label": part.title },
          h(
            "div",
            { class: "row" },
            h("h3", {}, part.title),
            h("div", { class: "tools" }, ...exportButtonsOf(`map-${part.name}`)),
          ),
          grids[i].element,
        ),
      ),
    );
    grids.forEach((grid) => grid.draw());
  };
  const addUp = () => {
    const layer = state.number("layer");
    sums.replaceChildren(
      ...view.parts
        .map((part) => {
          const row = part.rows.find((one) => one.layer === layer);
          if (!row) return null;
          const kept = sumOf(row.cells);
          const parts = [
            { label: `layer ${layer} ${part.title}`, units: kept + row.others[1], always: true },
            ...footOf({ others: [0, 0], rest: row.rest, bias: row.bias }),
          ];
          return sumLine(parts, row.total, sheet, { value: sheet.own_sums ? null : sheet.value });
        })
        .filter(Boolean),
    );
    if (!sums.childElementCount) {
      const totals = view.parts.flatMap((part) => part.rows.map((row) => row.total));
      sums.append(manySums(totals, sheet));
    }
  };
  page.whenShown.push(() =>
    reacting(page, ["position", "layer", "part"], () => {
      build();
      addUp();
    }),
  );
  page.whenResized.push(() => {
    drawnFor = null;
    build();
  });
  return card({ id: "map", title: view.title, lead: view.lead }, holder, sums);
};
