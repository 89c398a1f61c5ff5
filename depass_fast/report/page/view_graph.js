// A graph: who reads from whom. The strongest edges are drawn; a click on a node shows all that come into it and go
// out of it.

const MOST_EDGES = 1500,
  FEWEST_EDGES = 10,
  USUAL_EDGES = 150;

views.graph = (view, sheet, page) => {
  const model = graphModel(view, sheet),
    { nodes, edges, byId } = model;
  const most = Math.min(MOST_EDGES, edges.length),
    fewest = Math.min(FEWEST_EDGES, most);
  const measure = () => (BY[state.get("by")] ? state.get("by") : "influence");
  const count = () => Math.max(fewest, Math.min(most, state.number("edges") || USUAL_EDGES));
  const chosen = () => byId.get(state.get("node")) ?? null;
  const pick = (id) => state.set({ node: id === null || state.get("node") === id ? null : id, path: null });
  const path = () => (chosen() ? null : (model.paths[state.number("path") - 1] ?? null));
  const said = (node) =>
    [
      node.label,
      ...model.facts(node).map(([name, text]) => (name === "kind" || name === "at" ? text : `${name} ${text}`)),
    ].join(", ");

  // -- the picture: one element that the keys move in, and Vega draws ---------------------------------------------

  const picture = h("div", { class: "picture", "aria-hidden": "true" });
  const option = h("div", { role: "option", id: `node-${view.id}`, class: "unseen" });
  const box = h(
    "div",
    {
      class: "grid",
      role: "listbox",
      tabindex: "0",
      "data-graph": view.id,
      "aria-label": "The nodes of the graph",
      "aria-activedescendant": option.id,
      "aria-description":
        "Arrow keys move among the nodes, Home goes to the target, Enter chooses, Escape takes the choice back.",
    },
    option,
    picture,
  );
  let isFocused = false,
    cursor = 0,
    drawing = 0;
  const legend = h("div", { class: "picture", "aria-hidden": "true" }),
    kinds = Object.keys(SHAPES).filter(
      (kind) => nodes.some((one) => one.kind === kind) || edges.some((one) => one.s === kind),
    );
  const drawingOf = (width, at, hasLegend = true) =>
    graphDrawing(model, {
      width,
      hasLegend,
      by: measure(),
      count: count(),
      chosen: chosen(),
      path: path(),
      cursor: at,
      band: state.number("position"),
    });
  const draw = async () => {
    option.textContent = said(nodes[cursor]);
    option.setAttribute("aria-selected", String(chosen()?.i === cursor));
    const mine = ++drawing,
      holder = h("div"),
      spec = drawingOf(Math.max(300, box.clientWidth - 8), isFocused ? cursor : null, false);
    const { view: drawnView } = await drawn(holder, spec);
    if (mine !== drawing) return drawnView.finalize();
    picture.replaceChildren(holder);
    fold.textContent = foldText(spec);
    reveal(spec);
    drawnView.addEventListener("click", (event, item) => item?.mark?.name !== "edge" && pick(item?.datum?.id ?? null));
  };
  // the picture may be wider than its box: where the cursor is, what is chosen or the target comes into view, once
  let revealed = null;
  const reveal = (spec) => {
    const node = isFocused ? nodes[cursor] : (chosen() ?? nodes[0]),
      key = `${node.id} ${spec.width}`;
    if (key === revealed) return;
    revealed = key;
    const margin = picture.scrollWidth - spec.width,
      x = valuesOf(spec, "nodes").find((one) => one.i === node.i).x + margin / 2,
      left = x - box.scrollLeft;
    if (left < 40 || left > box.clientWidth - 40) box.scrollLeft = x - box.clientWidth * (ahead > 0 ? 0.75 : 0.25);
  };
  const levels = [...new Set(nodes.map((node) => node.y))].sort((a, b) => a - b),
    ahead = sheet.direction === "rtl" ? -1 : 1;
  const moved = (dx, dy) => {
    const from = nodes[cursor],
      level = dy ? levels[levels.indexOf(from.y) + dy] : from.y,
      away = (node) => Math.abs(node.x - from.x);
    const there = nodes.filter((node) => node.y === level && (dy || (node.x - from.x) * dx * ahead > 0));
    return there.reduce((best, node) => (best === null || away(node) < away(best) ? node : best), null)?.i ?? cursor;
  };
  box.addEventListener("keydown", (event) => {
    const way = { ArrowUp: [0, 1], ArrowDown: [0, -1], ArrowRight: [1, 0], ArrowLeft: [-1, 0] }[event.key];
    if (way) cursor = moved(...way);
    else if (event.key === "Home") cursor = 0;
    else if (event.key === "Enter" || event.key === " ") pick(nodes[cursor].id);
    else if (event.key === "Escape") pick(null);
    else return;
    event.preventDefault();
    isFocused = true;
    draw();
  });
  box.addEventListener("focus", () => {
    isFocused = box.matches(":focus-visible");
    if (isFocused) draw();
  });
  box.addEventListener("blur", () => {
    if (isFocused) {
      isFocused = false;
      draw();
    }
  });

  // -- what is drawn ----------------------------------------------------------------------------------------------

  const by = h(
    "select",
    {
      "aria-label": "What makes an edge strong",
      onchange: (event) => state.set({ by: event.target.value === "influence" ? null : event.target.value }),
    },
    ...Object.entries(BY).map(([name, text]) => h("option", { value: name }, text)),
  );
  const span = Math.log(most / fewest) || 1,
    rounded = (x) => Number(x.toPrecision(2));
  const slider = h("input", {
    type: "range",
    min: 0,
    max: 100,
    "aria-label": "Edges that are drawn",
    oninput: (event) => {
      const found =
        event.target.value === "100"
          ? most
          : Math.max(fewest, rounded(fewest * Math.exp((event.target.value / 100) * span)));
      state.set({ edges: found === USUAL_EDGES ? null : found });
    },
  });
  const how = h("span", { class: "muted" }),
    fold = h("p", { class: "note" });
  const controlled = () => {
    const name = measure(),
      held = sumOf(model.ranking(name).slice(0, count()).map(model.sizes[name])) / (model.sums[name] || 1);
    by.value = name;
    slider.value = (100 * Math.log(count() / fewest)) / span;
    how.textContent = `${written(count())} of ${counted(view.edges, "edge")}, ${percent(held)} of ${
      name === "share" ? "Σ |share|" : "all influence"
    }`;
    slider.setAttribute("aria-valuetext", how.textContent);
  };

  // -- the page -----------------------------------------------------------------------------------------------------

  const listed = graphTables({ model, chosen, path, pick, said });
  const standOut = () =>
    chosen() ? `, those of ${chosen().label} stand out` : path() ? ", those of one path stand out" : "";
  const lines = (spec) => [
    `Graph: ${sheet.headline}`,
    `${how.textContent} are drawn${standOut()}`,
    ...(valuesOf(spec, "columns").every((one) => !one.isMarked)
      ? []
      : [`the band is position ${state.get("position")}, which was chosen`]),
    "orange raises the target, blue lowers it; every node's incoming edges, all of them, sum to its activation",
    ...[foldText(spec)].filter(Boolean),
    ...leftOut(view),
    view.about,
    ...warningsOf(sheet),
  ];
  const tools = exportButtons("graph", () => {
    const spec = drawingOf(1040, null);
    return { spec, lines: lines(spec) };
  });
  const drawLegend = () => drawn(legend, legendSpec(kinds, Math.max(200, box.clientWidth - 8)));
  page.whenShown.push(drawLegend, () =>
    reacting(page, ["node", "path", "edges", "by", "position"], () => {
      cursor = chosen()?.i ?? cursor;
      controlled();
      listed.fillList();
      listed.explain();
      draw();
    }),
  );
  page.whenShown.push(() => reacting(page, ["find.nodes"], listed.fillList));
  page.whenResized.push(drawLegend, draw);
  return card(
    { id: "graph", title: view.title, lead: view.lead, tools },
    h(
      "div",
      { class: "filters controls" },
      h("label", {}, h("span", { class: "muted" }, "Strongest by"), " ", by),
      h("label", {}, h("span", { class: "muted" }, "Edges"), " ", slider),
      how,
    ),
    legend,
    box,
    fold,
    ...leftOut(view).map((text) => h("p", { class: "note" }, text)),
    ...listed.elements,
  );
};
