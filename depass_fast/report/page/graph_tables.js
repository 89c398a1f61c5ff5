// The tables of a graph: its nodes, what the chosen one reads, who reads it, and the leading paths.

const HOW_READ =
  "Numbers are parts of the activation. Colours are those of the target: orange raises it, blue lowers it.";

// chosen() and path() say what is chosen, pick(id) chooses a node; said(node) is a node in words
function graphTables({ model, chosen, path, pick, said }) {
  const { sheet, nodes, readOf, into, outOf } = model;
  const head = h("div", { class: "details chosen", "aria-live": "polite" }),
    reads = h("div", { class: "side" }),
    readers = h("div", { class: "side" }),
    below = h("div", { class: "sums" });
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
  const inWords = (edge) =>
    model
      .factsOfEdge(edge)
      .map((fact) => fact.join(" "))
      .join(", ");

  // all nodes, or those of the chosen position, as far as their names hold what is typed
  const listTitle = h("h4"),
    nodeTable = h("div"),
    find = findBox("find.nodes", "nodes");
  const list = h("div", { class: "side" }, listTitle, h("div", { class: "filters" }, find), nodeTable);
  const fillList = () => {
    if (document.activeElement !== find) find.value = state.get("find.nodes") ?? "";
    const position = state.number("position"),
      text = find.value.trim().toLowerCase();
    const isHere = (node) => position === null || node.position === position;
    const rows = nodes
      .slice(1)
      .filter((node) => isHere(node) && `${node.label} ${node.id}`.toLowerCase().includes(text))
      .map((node) => ({ id: node.id, label: node.label, units: node.share, say: said(node) }));
    const caption = position === null ? "Nodes, by share" : `Nodes at position ${position}, by share`;
    listTitle.textContent = caption;
    nodeTable.replaceChildren(table("nodes", caption, { head: "Node", rows }));
  };

  const followed = (one, k) => {
    const isPicked = path() === one;
    const steps = one.steps.flatMap((i, step) => [step ? " › " : "", bdi(nodes[i].label)]);
    const attributes = {
      type: "button",
      class: isPicked ? "path picked" : "path",
      "aria-pressed": String(isPicked),
      onclick: () => state.set({ path: isPicked ? null : k + 1 }),
    };
    return h("li", {}, h("button", attributes, h("span", { class: "muted" }, percent(one.strength)), " ", ...steps));
  };

  // what a node reads, and the line of its sum; a token reads nothing
  const footOfRead = (read) => [
    ...(read.left[1] || read.left[0]
      ? [{ label: `${counted(read.left[0], "edge")} left out`, units: read.left[1], isRounding: !read.left[0] }]
      : []),
    ...(read.others ? [{ label: "others", units: read.others }] : []),
    ...(read.bias ? [{ label: "bias", units: read.bias }] : []),
  ];
  const fillReads = (node, read) => {
    const own = { ...sheet, unit: read.unit, value: read.activation, what: node.i ? "activation" : sheet.what };
    const rows = into
      .get(node.i)
      .filter((edge) => nodes[edge.s])
      .map((edge) => ({
        id: nodes[edge.s].id,
        label: nodes[edge.s].label,
        units: edge.units,
        sign: Math.sign(edge.share),
        say: inWords(edge),
      }));
    const foot = footOfRead(read),
      caption = `${node.i ? node.label : "The target"} reads`;
    const isPart = node.kind === "neuron" || node.kind === "feature"; // the activation of others is a share itself
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
        word: isPart ? "part of activation" : "share",
        lines: () => [`${caption}: ${sheet.headline}`, ...(isPart ? [HOW_READ] : [])],
      }),
    );
    const edges = { label: counted(rows.length, "edge"), units: sumOf(rows.map((row) => row.units)), always: true };
    const line = sumLine([edges, ...foot], read.total, own, { value: own.value });
    const error = h("span", { class: "muted" }, "its edges' sum is off by");
    line.append(h("span", { class: "part" }, error, " ", read.error.toExponential(1)));
    return line;
  };
  const fillNothingRead = () => {
    const text = "A token reads nothing: here the graph begins.";
    reads.replaceChildren(h("h4", {}, "Reads"), h("p", { class: "muted" }, text));
  };

  // who reads a node, and the line of its share; in the place of the target's, the leading paths
  const fillReaders = (node) => {
    const rows = outOf.get(node.i).map((edge) => ({
      id: nodes[edge.t].id,
      label: edge.t ? nodes[edge.t].label : "target",
      units: Math.round(edge.share / sheet.unit),
      say: inWords(edge),
    }));
    const shown = sumOf(rows.map((row) => row.units)),
      foot = [{ label: "by way of others", units: node.share - shown }];
    const caption = `${node.label} is read by`;
    readers.replaceChildren(
      h("h4", {}, bdi(caption)),
      table("readers", caption, { head: "By way of", rows, foot, total: node.share, totalName: "share" }),
    );
    const ways = { label: `by way of ${counted(rows.length, "node")}`, units: shown, always: true };
    return sumLine([ways, ...foot], node.share, sheet, { name: "share in the target" });
  };
  const fillPaths = () =>
    readers.replaceChildren(
      h("h4", {}, "Leading paths, by influence"),
      h("ol", { class: "paths" }, ...model.paths.map(followed)),
    );

  // of the chosen node, or of the target
  const explain = () => {
    const node = chosen() ?? nodes[0],
      read = readOf(node.i);
    const facts = model.facts(node).map(([name, text]) => (["kind", "at"].includes(name) ? text : `${name} ${text}`));
    head.replaceChildren(
      h("h3", {}, bdi(node.i ? node.label : sheet.target)),
      h("p", { class: "muted" }, bdi(facts.join(" · "))),
    );
    const sums = [read ? fillReads(node, read) : fillNothingRead(), node.i ? fillReaders(node) : fillPaths()];
    below.replaceChildren(...sums.filter(Boolean));
  };
  return { elements: [head, h("div", { class: "columns three" }, reads, readers, list), below], fillList, explain };
}
