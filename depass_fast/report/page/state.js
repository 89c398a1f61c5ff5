// What is chosen: the sheet, a position, a layer and part, a head or neuron, a graph's node; the order and length of
// tables, and what is typed to filter them. It is the URL's hash.

const KEYS = ["sheet", "position", "layer", "part", "head", "neuron", "node", "path", "edges", "by"];
const OF_TABLES = /^(sort|all|find)\.[\w-]+$/;

const state = {
  values: {},
  listeners: [],
  get(key) {
    return this.values[key] ?? null;
  },
  number(key) {
    return this.get(key) === null ? null : Number(this.get(key));
  },
  // null takes a choice back
  set(changes) {
    for (const [key, value] of Object.entries(changes)) {
      if (value === null || value === undefined || value === "") delete this.values[key];
      else this.values[key] = String(value);
    }
    const hash = new URLSearchParams(this.values).toString();
    try {
      history.replaceState(null, "", hash ? `#${hash}` : location.pathname + location.search);
    } catch {
      /* a page that stands in a frame of another one has no address */
    }
    this.tell();
  },
  // what the address says, less what its sheet does not have: an address may be old, or another page's
  read(sheets) {
    const found = [...new URLSearchParams(location.hash.slice(1))];
    this.values = Object.fromEntries(found.filter(([key]) => KEYS.includes(key) || OF_TABLES.test(key)));
    if (!isPlace(this.values.sheet ?? "0", sheets.length)) delete this.values.sheet;
    const isKnown = knownOf(sheets[this.number("sheet") ?? 0]);
    for (const [key, value] of Object.entries(this.values)) if (!isKnown(key, value)) delete this.values[key];
    if (this.values.layer === undefined) delete this.values.part;
  },
  tell() {
    keepingFocus(() => this.listeners.forEach((listener) => listener()));
  },
};

const isPlace = (text, count) => /^(0|[1-9]\d*)$/.test(text) && Number(text) < count;

// (key, value) => whether a sheet has what the value names
function knownOf(sheet) {
  const groups = sheet.views.flatMap((view) => [
    ...(view.groups ?? []),
    ...mapParts(view).flatMap((part) => part.rows),
  ]);
  const layers = new Set(groups.filter((group) => (group.layer ?? null) !== null).map((group) => String(group.layer)));
  const parts = new Set(sheet.views.flatMap((view) => mapParts(view).map((part) => part.name)));
  const graph = sheet.views.find((view) => view.kind === "graph");
  const labels = (id) => {
    const found = sheet.views.filter((view) => view.id === id);
    return new Set(
      found.flatMap((view) => [
        ...view.groups.flatMap((group) => group.rows.map(([label]) => label)),
        ...Object.keys(view.totals ?? {}),
      ]),
    );
  };
  const known = {
    position: (value) => isPlace(value, sheet.tokens.length),
    layer: (value) => layers.has(value),
    part: (value) => parts.has(value),
    head: (value) => labels("heads").has(value),
    neuron: (value) => labels("neurons").has(value),
    node: (value) => Boolean(graph?.nodes.some(([id]) => id === value)),
    path: (value) => value !== "0" && isPlace(value, (graph?.paths.length ?? 0) + 1),
    edges: (value) => isPlace(value, Infinity),
    by: (value) => Object.hasOwn(BY, value),
    sort: (value) => /^(label|share|size):(a|de)scending$/.test(value),
  };
  return (key, value) => known[key.split(".")[0]]?.(value) ?? true;
}

const mapParts = (view) => view.parts ?? [];
