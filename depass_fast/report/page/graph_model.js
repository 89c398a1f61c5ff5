// A graph's numbers: nodes, edges, which of them are strong, and how they are said.

const BY = { influence: "influence", share: "share in the target" };

function graphModel(view, sheet) {
  const nodes = view.nodes.map(([id, kind, layer, position, share, influence, x, y], i) => ({
    i,
    id,
    kind,
    layer,
    position,
    share,
    influence,
    x,
    y,
    label: nodeName(sheet, id),
    name: kind === "target" ? sheet.target : kind === "token" ? nodeName(sheet, id) : id.slice(0, id.lastIndexOf("@")),
  }));
  const byId = new Map(nodes.map((node) => [node.id, node]));
  const readOf = (i) => view.reads[i === 0 ? 0 : i < view.first ? -1 : i - view.first + 1]; // tokens read nothing
  const readers = nodes.filter((node) => readOf(node.i)); // those that read last come first
  const into = new Map(nodes.map((node) => [node.i, []])),
    outOf = new Map(nodes.map((node) => [node.i, []]));

  const sums = { influence: 0, share: 0 }; // of all edges, those that the page leaves out, too
  // an edge: its weight in units of its reader, its influence, and what of its source's share in the target goes by it
  for (const node of readers) {
    const read = readOf(node.i),
      slope = node.i === 0 ? 1 : read.activation ? (node.share * sheet.unit) / read.activation : 0;
    sums.influence += node.influence;
    sums.share += read.size * Math.abs(slope);
    for (const [s, units] of [...pairs(read.from), ["others", read.others], ["bias", read.bias]]) {
      if (!units) continue;
      const edge = {
        s,
        t: node.i,
        units,
        weight: units * read.unit,
        share: units * read.unit * slope,
        influence: (Math.abs(units * read.unit) / (read.size || 1)) * node.influence,
      };
      into.get(node.i).push(edge);
      outOf.get(s)?.push(edge);
    }
  }
  const edges = [...into.values()].flat();
  const sizes = Object.fromEntries(Object.keys(BY).map((by) => [by, (edge) => Math.abs(edge[by])]));

  // the strongest edges first, none before one that leads on from its reader: what is drawn hangs together
  const ranked = {};
  const ranking = (by) => {
    if (ranked[by]) return ranked[by];
    const best = new Map([[0, Infinity]]),
      level = new Map();
    for (const node of readers) {
      for (const edge of into.get(node.i)) {
        level.set(edge, Math.min(sizes[by](edge), best.get(node.i) ?? 0));
        best.set(edge.s, Math.max(best.get(edge.s) ?? 0, level.get(edge)));
      }
    }
    return (ranked[by] = [...edges].sort((a, b) => level.get(b) - level.get(a) || sizes[by](b) - sizes[by](a)));
  };
  const largest = sizeOf(nodes.slice(1).map((node) => node.share)),
    format = formatter(Math.max(largest, Math.abs(nodes[0].share)), sheet.unit);
  const strengths = (by) => {
    const found = nodes.map((node) => (by === "share" ? Math.abs(node.share) : node.influence)),
      most = Math.max(...found.slice(view.first)) || 1;
    return found.map((size) => Math.sqrt(Math.min(1, size / most)));
  };

  // the leading paths: their nodes' numbers, their edges and their strength
  const paths = view.paths.map(([steps, strength]) => ({
    steps,
    strength,
    edges: steps
      .slice(1)
      .map((t, k) => into.get(t).find((edge) => edge.s === steps[k]))
      .filter(Boolean),
  }));
  const nameOf = (s) => nodes[s]?.label ?? s;
  const where = (node) => `${tokenName(sheet, node.position)} at position ${node.position}`;
  const what = (node) =>
    node.kind === "target" ? "target" : node.layer === null ? node.kind : `${node.kind} of layer ${node.layer}`;
  // [name, text] of all that is known of a node
  const facts = (node) => {
    const read = readOf(node.i);
    return [
      ["kind", what(node)],
      ["at", where(node)],
      ...(read ? [["activation", number(read.activation)]] : []),
      ...(node.i
        ? [
            ["share", format(node.share)],
            ["influence", percent(node.influence)],
          ]
        : []),
    ];
  };
  const factsOfEdge = (edge) => [
    ["gives", `${number(edge.weight)} of ${number(readOf(edge.t).activation)}`],
    ["share by this way", number(edge.share)],
    ["influence", percent(edge.influence)],
  ];
  return {
    view,
    sheet,
    nodes,
    byId,
    readOf,
    into,
    outOf,
    edges,
    sizes,
    sums,
    ranking,
    strengths,
    largest,
    paths,
    nameOf,
    where,
    what,
    facts,
    factsOfEdge,
  };
}

const percent = (x) => `${(100 * x).toFixed(x < 0.0995 ? 2 : 1)} %`;
const number = (x) => (x < 0 ? "−" : "+") + Number(Math.abs(x).toPrecision(4)).toString();

// what a page of a large graph does not hold
function leftOut(view) {
  const [seats, tokens] = view.left,
    said = [];
  if (seats) said.push(`Left out: ${counted(seats, "node")} of little influence. What they give is in others.`);
  if (tokens)
    said.push(`Left out: ${counted(tokens, "token")} of little influence. What they give is among the edges left out.`);
  return said;
}
