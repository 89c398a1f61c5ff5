// The picture of a graph, by Vega: nodes in their places, edges as curves. All is declared; here are only pixels.

const SHAPES = {
  // of a square from -1 to 1
  target: "M0,-1.25L0.35,-0.45L1.2,-0.38L0.55,0.18L0.75,1.02L0,0.57L-0.75,1.02L-0.55,0.18L-1.2,-0.38L-0.35,-0.45Z",
  feature: "M0,-1L0.87,-0.5L0.87,0.5L0,1L-0.87,0.5L-0.87,-0.5Z",
  token: "square",
  head: "triangle-up",
  neuron: "circle",
  others: "diamond",
  bias: "cross",
};
const AT_A_NODE = 60,
  NAMED = 14; // edges in each direction, and names, that are drawn at most
const WORDS = { others: "others: all neurons that are no nodes" };

function curve([x1, y1], [x2, y2], isBowed) {
  const up = y1 - y2,
    bow = isBowed && Math.abs(x1 - x2) < 18 ? Math.min(60, 5 + 0.13 * Math.abs(up)) : 0,
    bend = bow ? 0.25 : 0.45;
  const points = [x1, y1, x1 + bow, y1 - bend * up, x2 + bow, y2 + bend * up, x2, y2].map((x) => x.toFixed(1));
  return `M${points.slice(0, 2)}C${points.slice(2)}`;
}

// names beside the leading nodes, as far as there is room: the first ones have the best places
function graphLabels(nodes, width) {
  const taken = nodes.filter((one) => one.strength > 0.3).map((one) => [one.x - 5, one.y - 5, one.x + 5, one.y + 5]),
    found = [];
  for (const { x, y, name, radius, isBold } of nodes.filter((one) => one.name)) {
    const wide = (isBold ? 7 : 6.4) * name.length + 4,
      away = radius + 4;
    const places = [
      [x + away, y, "left"],
      [x - away, y, "right"],
      [x, y - away - 5, "center"],
      [x, y + away + 6, "center"],
    ];
    for (const [at, level, align] of places) {
      const start = align === "left" ? at : align === "right" ? at - wide : at - wide / 2;
      const box = [start, level - 7, start + wide, level + 7];
      const isFree = taken.every((one) => box[2] < one[0] || box[0] > one[2] || box[3] < one[1] || box[1] > one[3]);
      if (start < -4 || start + wide > width + 24 || !(isFree || (isBold && align === "left"))) continue;
      taken.push(box);
      found.push({ x: at, y: level, align, text: name, isBold: Boolean(isBold) });
      break;
    }
  }
  return found;
}

const byKinds = (kinds) => ({
  name: "shape",
  type: "ordinal",
  domain: kinds.map((kind) => WORDS[kind] ?? kind),
  range: kinds.map((kind) => SHAPES[kind]),
});

// what is drawn: the ``count`` strongest edges and those of the ``chosen`` node or path, which stand out; a ring around
// the ``cursor``
function graphDrawing(model, { width, by, count, chosen, path, cursor, band, hasLegend = true }) {
  const { view, sheet, nodes, into, outOf, sizes } = model,
    size = sizes[by];
  const strongest = (edges) => edges.reduce((most, edge) => Math.max(most, size(edge)), 0) || 1;
  const leading = (edges) => [...edges].sort((a, b) => size(b) - size(a)).slice(0, AT_A_NODE);
  const list = model.ranking(by).slice(0, count),
    own = chosen ? [...leading(into.get(chosen.i)), ...leading(outOf.get(chosen.i))] : path ? path.edges : [];
  const lit = new Set(chosen || path ? own : list),
    top = strongest(lit.size ? [...lit] : list),
    touched = new Set([...lit].flatMap((edge) => [edge.s, edge.t]));
  const strengths = model.strengths(by),
    tipOf = (title, facts) => ({ title: visible(title), ...Object.fromEntries(facts) });
  const ends = [...own, ...list].flatMap((edge) => [nodes[edge.s], nodes[edge.t]]),
    leaders = [nodes[0], chosen, nodes[cursor], ...ends].filter(Boolean),
    places = graphPlaces(view, sheet, width, new Set([...leaders.map((one) => one.position), band]));
  const seats = nodes.map((one) => {
    if (!places.columns.has(one.position)) return null; // folded, and at no line
    const [x, y] = places.at(one),
      strength = strengths[one.i],
      isFaint = one.i > 0 && one.i !== chosen?.i && !touched.has(one.i);
    return {
      i: one.i,
      id: one.id,
      x,
      y,
      kind: one.kind,
      word: one.kind,
      value: one.share * sheet.unit,
      isFaint,
      strength: isFaint ? 0 : strength,
      radius: one.i === 0 ? 9 : one.kind === "token" ? 3.5 + 4 * strength : 2.4 + 8 * strength,
      tip: tipOf(one.label, model.facts(one)),
    };
  });
  const stubs = [],
    edges = [];
  for (const edge of new Set([...own, ...list])) {
    const to = seats[edge.t],
      isFaint = !lit.has(edge),
      strength = isFaint ? 0 : Math.min(1, Math.sqrt(size(edge) / top));
    const tip = tipOf(`${model.nameOf(edge.s)} → ${model.nameOf(edge.t)}`, model.factsOfEdge(edge));
    let from = seats[edge.s];
    if (!from) {
      // others and bias stand beside the node that reads them
      const away = to.radius + 6;
      from = {
        i: -1 - stubs.length,
        x: to.x + (edge.s === "others" ? -away : away),
        y: to.y + away,
        kind: edge.s,
        word: WORDS[edge.s] ?? edge.s,
        value: edge.share,
        isFaint,
        radius: 2 + 4 * strength,
        tip,
      };
      stubs.push(from);
    }
    edges.push({
      path: curve([from.x, from.y], [to.x, to.y], Boolean(from.id)),
      strength,
      sign: Math.sign(edge.share),
      isFaint,
      s: from.i,
      t: edge.t,
      tip,
    });
  }
  edges.sort((a, b) => a.strength - b.strength);
  const seated = seats.filter(Boolean);
  const others = seated.filter((one) => one.kind !== "token" && one.i > 0),
    isNamed = (one) => !one.isFaint && one.i !== chosen?.i;
  const onPath = path ? path.steps.slice(0, -1).map((i) => seats[i]) : [],
    strong = path
      ? []
      : others
          .filter(isNamed)
          .sort((a, b) => b.strength - a.strength)
          .slice(0, NAMED);
  const named = [...new Set([...(chosen ? [seats[chosen.i]] : []), seats[0], ...onPath, ...strong])];
  const labels = graphLabels(
    [
      ...named.map((one) => ({ ...one, name: visible(nodes[one.i].name), isBold: one.i === 0 || one.i === chosen?.i })),
      ...others,
    ],
    places.width,
  );
  const marked = [
    ...(chosen ? [{ ...seats[chosen.i], isCursor: false }] : []),
    ...(cursor === null ? [] : [{ ...seats[cursor], isCursor: true }]),
  ];
  return graphSpec({
    view,
    sheet,
    places,
    nodes: [...stubs, ...seated],
    edges,
    labels,
    marked,
    band,
    available: width,
    hasLegend,
    largest: model.largest * sheet.unit,
  });
}

// edges: {path, strength 0 to 1, sign, isFaint, s, t, tip}; nodes: {i, x, y, kind, radius, value, isFaint, tip}
function graphSpec({ view, sheet, places, nodes, edges, labels, largest, band, marked, available, hasLegend }) {
  const { unit, step, width, height } = places,
    ink = colour("ink"),
    muted = colour("muted"),
    line = colour("line");
  const kinds = Object.keys(SHAPES).filter((kind) => nodes.some((one) => one.kind === kind)),
    isSmall = unit < 26;
  const layers = Array.from({ length: view.layers }, (_, i) => ({ name: String(i), y: places.y(i) }));
  const every = Math.ceil(13 / step);
  const columns = [...places.columns.values()].map(({ position, x, wide }) => ({
    x,
    wide,
    text: tokenText(sheet, position).trim() || "␣",
    isMarked: position === band,
  }));
  const gaps = places.gaps.map(({ run: [first, last], x, wide }) => ({
    x,
    wide,
    text: `…${written(last - first + 1)}`,
    tip: `positions ${first} to ${last}: no line is drawn of these tokens`,
    isGap: true,
  }));
  const isTurned = columns.some((one) => one.text.length * 6.6 > one.wide + 4);
  const isNear = "(datum.s === hovered || datum.t === hovered)";
  const text = (from, encode) => ({
    type: "text",
    interactive: false,
    aria: false,
    from: { data: from },
    encode: {
      update: {
        x: { field: "x" },
        y: { field: "y" },
        baseline: { value: "middle" },
        font: { value: FONT },
        fontSize: { value: 11 },
        ...encode,
      },
    },
  });
  return {
    $schema: VEGA,
    width,
    height,
    padding: 6,
    autosize: "pad",
    signals: [
      {
        name: "hovered",
        value: null,
        on: [
          { events: "@node:pointerover", update: "datum.i" },
          { events: "@node:pointerout", update: "null" },
        ],
      },
    ],
    data: [
      { name: "columns", values: columns },
      { name: "gaps", values: gaps },
      { name: "axis", values: [...columns, ...gaps] },
      { name: "layers", values: layers },
      { name: "edges", values: edges },
      { name: "nodes", values: nodes },
      { name: "labels", values: labels },
      { name: "marked", values: marked },
    ],
    scales: [byKinds(kinds), { name: "share", ...diverging(largest), clamp: true }],
    legends: hasLegend ? [graphLegend(kinds, width)] : [],
    marks: [
      {
        type: "rect",
        aria: false,
        from: { data: "gaps" },
        encode: {
          update: {
            xc: { field: "x" },
            width: { signal: "datum.wide - 6" },
            y: { value: 0 },
            y2: { value: height },
            fill: { value: line },
            opacity: { value: 0.55 },
            tooltip: { field: "tip" },
          },
        },
      },
      {
        type: "rect",
        interactive: false,
        aria: false,
        from: { data: "columns" },
        encode: {
          update: {
            xc: { field: "x" },
            width: { field: "wide" },
            y: { value: 0 },
            y2: { value: height },
            fill: { value: colour("accent") },
            opacity: { signal: "datum.isMarked ? 0.13 : 0" },
          },
        },
      },
      {
        type: "rule",
        interactive: false,
        aria: false,
        from: { data: "layers" },
        encode: {
          update: {
            x: { value: 0 },
            x2: { value: width },
            y: { field: "y" },
            stroke: { value: line },
            strokeWidth: { value: 1 },
            opacity: { value: 0.6 },
          },
        },
      },
      ...(width > available ? [-10, width + 10] : [-10]).map((x) =>
        text("layers", {
          x: { value: x },
          align: { value: x < 0 ? "right" : "left" },
          text: { field: "name" },
          fill: { value: muted },
          opacity: { signal: `+datum.name % ${every} === 0 ? 1 : 0` },
        }),
      ),
      {
        type: "text",
        interactive: false,
        aria: false,
        encode: {
          update: {
            x: { value: -30 },
            y: { value: places.y((view.layers - 1) / 2) },
            angle: { value: -90 },
            text: { value: "layer" },
            align: { value: "center" },
            baseline: { value: "bottom" },
            fill: { value: muted },
            font: { value: FONT },
            fontSize: { value: 11 },
          },
        },
      },
      {
        type: "path",
        name: "edge",
        aria: false,
        from: { data: "edges" },
        encode: {
          update: {
            path: { field: "path" },
            fill: { value: null },
            strokeCap: { value: "round" },
            stroke: { signal: `datum.sign < 0 ? '${colour("negative")}' : '${colour("positive")}'` },
            strokeWidth: { signal: "0.7 + 5 * datum.strength" },
            opacity: {
              signal:
                `${isNear} ? 0.95 : (datum.isFaint ? 0.07 : 0.25 + 0.6 * datum.strength) * ` +
                "(hovered !== null ? 0.35 : 1)",
            },
            tooltip: { signal: "datum.tip" },
          },
        },
      },
      {
        type: "symbol",
        name: "node",
        aria: false,
        from: { data: "nodes" },
        encode: {
          update: {
            x: { field: "x" },
            y: { field: "y" },
            cursor: { value: "pointer" },
            size: { signal: "PI * datum.radius * datum.radius" },
            shape: { scale: "shape", field: "word" },
            fill: { scale: "share", field: "value" },
            stroke: { value: ink },
            strokeWidth: { signal: "datum.i === hovered ? 2 : 0.9" },
            strokeOpacity: { value: 0.75 },
            opacity: { signal: "datum.isFaint && datum.i !== hovered ? 0.28 : 1" },
            tooltip: { signal: "datum.tip" },
          },
        },
      },
      {
        type: "symbol",
        interactive: false,
        aria: false,
        from: { data: "marked" },
        encode: {
          update: {
            x: { field: "x" },
            y: { field: "y" },
            size: { signal: "PI * pow(datum.radius + 5, 2)" },
            fill: { value: null },
            strokeWidth: { value: 2.5 },
            stroke: { signal: `datum.isCursor ? '${colour("accent")}' : '${ink}'` },
          },
        },
      },
      text("labels", {
        align: { field: "align" },
        text: { field: "text" },
        stroke: { value: colour("card") },
        strokeWidth: { value: 3.5 },
        strokeJoin: { value: "round" },
        opacity: { value: 0.9 },
        fontWeight: { signal: "datum.isBold ? 650 : 400" },
      }),
      text("labels", {
        align: { field: "align" },
        text: { field: "text" },
        fill: { value: ink },
        fontWeight: { signal: "datum.isBold ? 650 : 400" },
      }),
      text("axis", {
        y: { value: height + (isTurned ? 8 : 16) },
        text: { field: "text" },
        fill: { signal: `datum.isGap ? '${muted}' : '${ink}'` },
        limit: { value: isTurned ? 90 : 200 },
        angle: { value: isTurned ? -90 : 0 },
        align: { value: isTurned ? "right" : "center" },
        fontSize: { value: isSmall ? 10.5 : 12 },
      }),
    ],
  };
}
