// A graph: who reads from whom. The strongest edges are drawn; a click on a node shows all that come into it and go out of it.

const MOST_EDGES = 1500,
  FEWEST_EDGES = 10,
  USUAL_EDGES = 150;
const HOW_READ =
  "Numbers are parts of the activation. Colours are those of the target: orange raises it, blue lowers it.";

views.graph = (view, sheet, page) => {
  const model = graphModel(view, sheet),
    { nodes, edges, byId, readOf, into, outOf } = model;
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
    how.textContent = `${count().toLocaleString("en")} of ${view.edges.toLocaleString("en")} edges, ${percent(held)} of ${
      name === "share" ? "Σ |share|" : "all influence"
    }`;
    slider.setAttribute("aria-valuetext", how.textContent);
  };

  // -- tables: the nodes, what the chosen one reads, and who reads it ---------------------------------------------

  const list = h("div", { class: "side" }),
    reads = h("div", { class: "side" }),
    readers = h("div", { class: "side" });
  const head = h("div", { class: "details chosen", "aria-live": "polite" });
  const find = h("input", {
    type: "search",
    placeholder: "Filter by name",
    "aria-label": "Filter nodes by name",
    oninput: () => listed(),
  });
  const table = (id, caption, more) =>
    shareTable({
      id: `graph-${id}`,
      caption,
      sheet,
      pick: (row) => pick(row.id),
      isPicked: (row) => row.id === state.get("node"),
      lines: () => [`${caption}: ${sheet.headline}`],
      most: 10,
      ...more,
    });
  const listed = () => {
    const position = state.number("position"),
      text = find.value.trim().toLowerCase();
    const rows = nodes
      .slice(1)
      .filter(
        (node) =>
          (position === null || node.position === position) && `${node.label} ${node.id}`.toLowerCase().includes(text),
      )
      .map((node) => ({ id: node.id, label: node.label, units: node.share, say: said(node) }));
    const caption = position === null ? "Nodes, by share" : `Nodes at position ${position}, by share`;
    list.replaceChildren(
      h("h4", {}, caption),
      h("div", { class: "filters" }, find),
      table("nodes", caption, { head: "Node", rows }),
    );
  };
  const followed = (one, k) => {
    const isPicked = path() === one;
    return h(
      "li",
      {},
      h(
        "button",
        {
          type: "button",
          class: isPicked ? "path picked" : "path",
          "aria-pressed": String(isPicked),
          onclick: () => state.set({ path: isPicked ? null : k + 1 }),
        },
        h("span", { class: "muted" }, percent(one.strength)),
        " ",
        ...one.steps.flatMap((i, step) => [step ? " › " : "", bdi(nodes[i].label)]),
      ),
    );
  };
  const explained = () => {
    const node = chosen() ?? nodes[0],
      read = readOf(node.i),
      sums = [];
    head.replaceChildren(
      h("h3", {}, bdi(node.i ? node.label : sheet.target)),
      h(
        "p",
        { class: "muted" },
        bdi(
          model
            .facts(node)
            .map(([name, text]) => (name === "kind" || name === "at" ? text : `${name} ${text}`))
            .join(" · "),
        ),
      ),
    );
    if (read) {
      const own = { ...sheet, unit: read.unit, value: read.activation, what: node.i ? "activation" : sheet.what };
      const rows = into
        .get(node.i)
        .filter((edge) => nodes[edge.s])
        .map((edge) => ({
          id: nodes[edge.s].id,
          label: nodes[edge.s].label,
          units: edge.units,
          sign: Math.sign(edge.share),
          say: model
            .factsOfEdge(edge)
            .map((fact) => fact.join(" "))
            .join(", "),
        }));
      const left =
        read.left[1] || read.left[0]
          ? [
              {
                label: `${read.left[0].toLocaleString("en")} edges left out`,
                units: read.left[1],
                isRounding: !read.left[0],
              },
            ]
          : [];
      const foot = [
        ...left,
        ...(read.others ? [{ label: "others", units: read.others }] : []),
        ...(read.bias ? [{ label: "bias", units: read.bias }] : []),
      ];
      const caption = `${node.i ? node.label : "The target"} reads`;
      const isPart = node.kind === "neuron" || node.kind === "feature", // the activation of others is a share itself
        word = isPart ? "part of activation" : "share";
      reads.replaceChildren(
        h("h4", {}, bdi(caption)),
        ...(isPart ? [h("p", { class: "muted" }, HOW_READ)] : []),
        table("reads", caption, {
          head: "From",
          rows,
          foot,
          total: read.total,
          totalName: "sum",
          sheet: own,
          word,
          lines: () => [`${caption}: ${sheet.headline}`, ...(isPart ? [HOW_READ] : [])],
        }),
      );
      const line = sumLine(
        [{ label: `${rows.length} edges`, units: sumOf(rows.map((row) => row.units)), always: true }, ...foot],
        read.total,
        own,
        { value: own.value },
      );
      line.append(
        h(
          "span",
          { class: "part" },
          h("span", { class: "muted" }, "completeness error"),
          " ",
          read.error.toExponential(1),
        ),
      );
      sums.push(line);
    } else
      reads.replaceChildren(
        h("h4", {}, "Reads"),
        h("p", { class: "muted" }, "A token reads nothing: here the graph begins."),
      );
    if (node.i) {
      const rows = outOf.get(node.i).map((edge) => ({
        id: nodes[edge.t].id,
        label: edge.t ? nodes[edge.t].label : "target",
        units: Math.round(edge.share / sheet.unit),
        say: model
          .factsOfEdge(edge)
          .map((fact) => fact.join(" "))
          .join(", "),
      }));
      const foot = [{ label: "by way of others", units: node.share - sumOf(rows.map((row) => row.units)) }];
      const caption = `${node.label} is read by`;
      readers.replaceChildren(
        h("h4", {}, bdi(caption)),
        table("readers", caption, { head: "By way of", rows, foot, total: node.share, totalName: "share" }),
      );
      sums.push(
        sumLine(
          [{ label: `by way of ${rows.length} nodes`, units: node.share - foot[0].units, always: true }, ...foot],
          node.share,
          sheet,
          { name: "share in the target" },
        ),
      );
    } else
      readers.replaceChildren(
        h("h4", {}, "Leading paths, by influence"),
        h("ol", { class: "paths" }, ...model.paths.map(followed)),
      );
    below.replaceChildren(...sums);
  };

  const below = h("div", { class: "sums" });
  const lines = (spec) => [
    `Graph: ${sheet.headline}`,
    `${how.textContent} are drawn${chosen() ? `, those of ${chosen().label} stand out` : path() ? ", those of one path stand out" : ""}`,
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
      listed();
      explained();
      draw();
    }),
  );
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
    head,
    h("div", { class: "columns three" }, reads, readers, list),
    below,
  );
};
