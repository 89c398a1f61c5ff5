// A heat map with the keyboard access of a grid: Vega draws it, and a row with one cell stands for where the cursor is.
// Screen readers are told how many rows and columns there are, and the cell that the arrow keys have moved to.

const WIDE = /[\u1100-\u11ff\u2e80-\ua4cf\uac00-\ud7ff\uf900-\ufaff\uff00-\uff60\u{1f000}-\u{3ffff}]/u;
let gridsMade = 0;

// about how many pixels a label takes
const widthOf = (text) => sumOf([...text].map((character) => (WIDE.test(character) ? 11.5 : 6.6)));

// columns: [{key, text}], rows: [{key, text}] from the bottom up, value(row, column) -> units or null,
// describe(row, column), chosen() -> [rowKey, columnKey] or null (either may be null), pick(rowKey, columnKey);
// direction: "rtl" where the first column is on the right
function heatMap({
  id,
  label,
  columns,
  rows,
  value,
  describe,
  chosen,
  pick,
  unit,
  xTitle,
  yTitle,
  largest,
  lines,
  width,
  margin = 62,
  direction = "ltr",
}) {
  const isReversed = direction === "rtl",
    longest = Math.max(...columns.map((column) => widthOf(visible(column.text))));
  const cells = [];
  rows.forEach((row, r) =>
    columns.forEach((column, c) => {
      const units = value(row, column);
      if (units !== null) cells.push({ r, c, value: units * unit, tip: describe(row, column) });
    }),
  );
  const most = largest * unit;
  const spec = (available) => {
    const stepX = Math.max(7, Math.min(34, Math.floor((available - margin) / Math.max(1, columns.length))));
    const stepY = Math.max(9, Math.min(26, Math.floor(440 / Math.max(1, rows.length))));
    return {
      width: columns.length * stepX,
      height: rows.length * stepY,
      params: [
        { name: "xs", value: columns.map((column) => visible(column.text)) },
        { name: "ys", value: rows.map((row) => row.text) },
        { name: "chosenRow", value: -1 },
        { name: "chosenColumn", value: -1 },
        { name: "cursorRow", value: -1 },
        { name: "cursorColumn", value: -1 },
      ],
      data: { values: cells },
      encoding: {
        x: {
          field: "c",
          type: "ordinal",
          title: xTitle,
          scale: { paddingInner: 0.06, domain: columns.map((_, i) => i), reverse: isReversed },
          axis: {
            labelExpr: "xs[datum.value]",
            labelAngle: longest > stepX ? -90 : 0,
            labelLimit: 96,
            ticks: false,
            domain: false,
            orient: "bottom",
            labelOverlap: true,
            labelSeparation: 2,
          },
        },
        y: {
          field: "r",
          type: "ordinal",
          title: yTitle,
          scale: { paddingInner: 0.06, domain: rows.map((_, i) => i).reverse() },
          axis: {
            labelExpr: "ys[datum.value]",
            labelLimit: margin - 20,
            ticks: false,
            domain: false,
            labelOverlap: stepY < 12,
          },
        },
      },
      layer: [
        {
          mark: { type: "rect", cornerRadius: 1.5, cursor: "pointer" },
          encoding: {
            color: {
              field: "value",
              type: "quantitative",
              scale: diverging(most),
              legend: {
                title: "share",
                orient: "top",
                direction: "horizontal",
                gradientLength: 210,
                gradientThickness: 8,
                values: [-most, -most / 4, 0, most / 4, most],
                format: ".2~g",
                titleAnchor: "start",
              },
            },
            opacity: {
              condition: {
                test: "(chosenRow < 0 || datum.r == chosenRow) && (chosenColumn < 0 || datum.c == chosenColumn)",
                value: 1,
              },
              value: 0.5,
            },
            tooltip: { field: "tip" },
          },
        },
        {
          transform: [{ filter: "datum.r == chosenRow && datum.c == chosenColumn" }],
          mark: { type: "rect", fill: null, stroke: colour("ink"), strokeWidth: 2 },
        },
        {
          transform: [{ filter: "datum.r == cursorRow && datum.c == cursorColumn" }],
          mark: { type: "rect", fill: null, stroke: colour("accent"), strokeWidth: 2.5 },
        },
      ],
    };
  };

  const cellId = `cell-${++gridsMade}`;
  const cell = h("div", { role: "gridcell", id: cellId });
  const row = h("div", { role: "row", class: "unseen" }, cell);
  const picture = h("div", { class: "picture", "aria-hidden": "true" });
  const grid = h(
    "div",
    {
      class: "grid",
      role: "grid",
      tabindex: "0",
      "data-grid": id,
      "aria-label": label,
      "aria-rowcount": rows.length,
      "aria-colcount": columns.length,
      "aria-activedescendant": cellId,
      "aria-description": "Arrow keys move, Enter chooses, Escape takes the choice back.",
    },
    row,
    picture,
  );

  const at = () => {
    const [r, c] = chosen() ?? [null, null];
    return [rows.findIndex((one) => one.key === r), columns.findIndex((one) => one.key === c)];
  };
  let [cursorRow, cursorColumn] = at(),
    view = null,
    isFocused = false;
  if (cursorRow < 0) cursorRow = rows.length - 1;
  if (cursorColumn < 0) cursorColumn = columns.length - 1;

  const say = () => {
    const [r, c] = [rows[cursorRow], columns[cursorColumn]],
      [chosenRow, chosenColumn] = at();
    row.setAttribute("aria-rowindex", rows.length - cursorRow);
    cell.setAttribute("aria-colindex", cursorColumn + 1);
    cell.setAttribute("aria-selected", String(chosenRow === cursorRow && chosenColumn === cursorColumn));
    cell.textContent = value(r, c) === null ? "no component" : describe(r, c);
  };
  const mark = () => {
    say();
    if (!view) return;
    const [r, c] = at();
    view.signal("chosenRow", r).signal("chosenColumn", c);
    view
      .signal("cursorRow", isFocused ? cursorRow : -1)
      .signal("cursorColumn", isFocused ? cursorColumn : -1)
      .runAsync();
  };
  const choose = (r, c) => {
    [cursorRow, cursorColumn] = [r, c];
    pick(rows[r].key, columns[c].key);
  };

  grid.addEventListener("keydown", (event) => {
    const ahead = isReversed ? -1 : 1;
    const moves = { ArrowUp: [1, 0], ArrowDown: [-1, 0], ArrowRight: [0, ahead], ArrowLeft: [0, -ahead] };
    if (moves[event.key]) {
      cursorRow = Math.max(0, Math.min(rows.length - 1, cursorRow + moves[event.key][0]));
      cursorColumn = Math.max(0, Math.min(columns.length - 1, cursorColumn + moves[event.key][1]));
    } else if (event.key === "Home") cursorColumn = 0;
    else if (event.key === "End") cursorColumn = columns.length - 1;
    else if (event.key === "PageUp") cursorRow = rows.length - 1;
    else if (event.key === "PageDown") cursorRow = 0;
    else if (event.key === "Enter" || event.key === " ") {
      if (value(rows[cursorRow], columns[cursorColumn]) !== null) choose(cursorRow, cursorColumn);
    } else if (event.key === "Escape") pick(null, null);
    else return;
    event.preventDefault();
    mark();
  });
  grid.addEventListener("focus", () => {
    isFocused = true;
    mark();
  });
  grid.addEventListener("blur", () => {
    isFocused = false;
    mark();
  });

  exporters.set(id, () => ({ spec: spec(680), lines: lines() }));
  const draw = async () => {
    const made = await drawn(picture, spec(width()));
    view = made.view;
    view.addEventListener("click", (event, item) => item?.datum?.r !== undefined && choose(item.datum.r, item.datum.c));
    mark();
  };
  say();
  return { element: grid, draw, mark };
}
