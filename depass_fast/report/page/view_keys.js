// Why a head looks where it looks: keys by components, and the components of one key. A click chooses a key.

const MOST_SEEN = 20; // components that are rows of the map

// the group of the key that is chosen, or of the leading one; and what its shares sum to
const chosenKey = (view) =>
  view.groups.find((group) => group.key !== null && group.key === state.number("position")) ?? view.groups[0];
const sumNameOf = (view, group) => (group.key === null ? "log ratio" : view.what);

views.keys = (view, sheet, page) => {
  const keys = view.groups.filter((group) => group.key !== null).sort((a, b) => a.key - b.key);
  const shareOf = new Map(keys.map((group) => [group.key, new Map(group.rows)]));
  const chosenGroup = () => chosenKey(view);
  const sizes = new Map(
    view.groups[0].rows.map(([label]) => [label, sizeOf(keys.map((group) => shareOf.get(group.key).get(label) ?? 0))]),
  );
  const seen = [...sizes]
    .sort((a, b) => b[1] - a[1])
    .slice(0, MOST_SEEN)
    .map(([label]) => label);
  const hidden = sizes.size - seen.length + view.groups[0].others[0];
  const rows = [
    ...["bias", "rest"].filter((name) => keys[0][name] !== null).map((name) => ({ key: name, text: name })),
    ...(hidden ? [{ key: "others", text: counted(hidden, "other") }] : []),
    ...[...seen].reverse().map((label) => ({ key: label, text: visible(label), isOwn: true })),
  ];
  const value = (row, column) => {
    const group = keys.find((one) => one.key === column.key);
    if (row.isOwn) return shareOf.get(column.key).get(row.key) ?? 0;
    if (row.key !== "others") return group[row.key];
    return group.others[1] + sumOf(group.rows.filter(([label]) => !seen.includes(label)).map(([, units]) => units));
  };
  const columns = keys.map((group) => ({
    key: group.key,
    text: `${tokenName(sheet, group.key)}@${group.key}`,
    p: group.p,
  }));
  const largest = sizeOf(rows.flatMap((row) => columns.map((column) => value(row, column))));
  const format = formatter(largest, sheet.unit);
  const left = h("div", { class: "side" }),
    right = h("div", { class: "side" }),
    sums = h("div", { class: "sums" }),
    note = h("p", { class: "note" });
  let grid = null;
  const draw = () => {
    grid = heatMap({
      id: "keys-map",
      label: "Components by key",
      unit: sheet.unit,
      largest,
      columns,
      direction: sheet.direction,
      rows,
      value,
      margin: 140,
      describe: (row, column) =>
        [
          row.text,
          `key ${tokenName(sheet, column.key)} at position ${column.key} (P ${(100 * column.p).toFixed(1)} %)`,
          `share ${format(value(row, column))}`,
        ].join(", "),
      chosen: () => [null, state.number("position")],
      pick: (row, column) => state.set({ position: column }),
      xTitle: "key",
      yTitle: view.components,
      width: () => Math.max(260, left.clientWidth),
      lines: () => [
        sheet.headline,
        `${view.components} by key: each column sums to its ${view.what}`,
        ...warningsOf(sheet),
      ],
    });
    left.replaceChildren(h("div", { class: "tools" }, ...exportButtonsOf("keys-map")), grid.element);
    grid.draw();
  };
  const fill = () => {
    const group = chosenGroup(),
      isOther = state.get("position") !== null && group.key !== state.number("position");
    const of = group.key === null ? group.name : `${tokenName(sheet, group.key)}@${group.key}`;
    const other = isOther ? `Position ${state.get("position")} is no key that is listed. ` : "";
    note.textContent = `${other}${of}${group.p === null ? "" : `, P ${(100 * group.p).toFixed(2)} %`}.`;
    const table = group.rows.map(([label, units]) => ({ label, units })),
      foot = footOf(group),
      name = sumNameOf(view, group);
    right.replaceChildren(
      shareTable({
        id: "keys",
        caption: `Components of ${of}`,
        rows: table,
        foot,
        total: group.total,
        totalName: name,
        sheet,
        lines: () => [sheet.headline, `${of}: ${name}`],
      }),
    );
    sums.replaceChildren(
      sumLine(
        [
          { label: `${written(table.length)} listed`, units: sumOf(table.map((row) => row.units)), always: true },
          ...foot,
        ],
        group.total,
        { ...sheet, what: name, value: group.value },
        { value: group.value },
      ),
    );
  };
  page.whenShown.push(() => {
    draw();
    reacting(page, ["position"], () => {
      fill();
      grid.mark();
    });
  });
  page.whenResized.push(draw);
  const gone = view.left > 0 ? ` Left out: ${counted(view.left, "key")} of less probability.` : "";
  const lead = `Each column sums to its key's ${view.what}. Choose a key to see its components.${gone}`;
  return card({ id: "keys", title: view.title, lead }, note, h("div", { class: "columns" }, left, right), sums);
};
