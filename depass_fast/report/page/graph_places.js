// The places of a graph's picture: columns are positions, rows are layers. Where there are too many columns, runs of
// tokens of which no line is drawn are folded into gaps.

const LEGIBLE = 26, // pixels of a column; where columns would be narrower, runs are folded
  NARROWEST = 9,
  WIDEST = 72,
  GAP = 38,
  MARGIN = 72; // beside the columns, for the numbers of layers

// `shown` are the positions that have a column. `at(node)` is in pixels, `gaps` are runs [first, last] between columns
function graphPlaces(view, sheet, available, shown) {
  const isWide = sumOf(view.columns.map(([, , width]) => width)) * LEGIBLE > available - MARGIN,
    parts = partsOf(isWide ? folded(view.columns, shown) : view.columns);
  const gaps = parts.filter((part) => part.run),
    widths = sumOf(parts.map((part) => (part.run ? 0 : part.width)));
  const unit = Math.max(NARROWEST, Math.min(WIDEST, (available - MARGIN - GAP * gaps.length) / widths)),
    step = Math.max(15, Math.min(56, 600 / (view.layers + 1.5)));
  const width = widths * unit + GAP * gaps.length,
    isRtl = sheet.direction === "rtl";
  let start = 0;
  for (const part of parts) {
    part.wide = part.run ? GAP : part.width * unit;
    part.x = isRtl ? width - start - part.wide / 2 : start + part.wide / 2;
    start += part.wide;
  }
  const columns = new Map(parts.filter((part) => !part.run).map((part) => [part.position, part]));
  const y = (level) => (view.layers + 0.5 - level) * step;
  const at = (node) => {
    const { x, center } = columns.get(node.position);
    return [x + (isRtl ? center - node.x : node.x - center) * unit, y(node.y)];
  };
  return { at, y, columns, gaps, unit, step, width, height: (view.layers + 1.5) * step };
}

// the columns that stay: those that are shown, and single ones between them, for which a gap would be no shorter
function folded(columns, shown) {
  const isAlone = (i) => {
    const [before, [position], after] = [columns[i - 1], columns[i], columns[i + 1]];
    const reaches = (one, by) => (one ? one[0] === position + by && shown.has(one[0]) : position + by < 0);
    return reaches(before, -1) && reaches(after, 1);
  };
  return columns.filter(([position], i) => shown.has(position) || isAlone(i));
}

// columns with the runs of positions that are missing between them
function partsOf(columns) {
  const parts = [];
  let next = 0;
  for (const [position, center, width] of columns) {
    if (position > next) parts.push({ run: [next, position - 1] });
    parts.push({ position, center, width });
    next = position + 1;
  }
  return parts;
}

// the kinds of nodes as a legend with as many columns as there is room for
function graphLegend(kinds, available) {
  const words = kinds.map((kind) => WORDS[kind] ?? kind),
    room = (word) => 38 + 6.4 * word.length;
  const widthOf = (count) =>
    sumOf(Array.from({ length: count }, (_, c) => Math.max(...words.filter((_, i) => i % count === c).map(room))));
  let columns = kinds.length;
  while (columns > 1 && widthOf(columns) > available) columns--;
  return {
    shape: "shape",
    orient: "top",
    direction: "horizontal",
    columns,
    symbolFillColor: colour("muted"),
    symbolStrokeWidth: 0,
    symbolSize: 70,
    columnPadding: 18,
    labelLimit: 300,
  };
}

const valuesOf = (spec, name) => spec.data.find((one) => one.name === name).values;

// the kinds of nodes, above the box: it stays where it is when the picture is scrolled
const legendSpec = (kinds, width) => ({
  $schema: VEGA,
  width: 1,
  height: 1,
  padding: 0,
  scales: [byKinds(kinds)],
  legends: [graphLegend(kinds, width)],
});

// what the gaps of a picture are, where there are some
function foldText(spec) {
  const [first] = valuesOf(spec, "gaps");
  return first ? "…N stands for N tokens of which no line is drawn." : "";
}
