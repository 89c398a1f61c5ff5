// What is chosen: the sheet, a position, a layer and part, a head or neuron, a graph's node, the order of tables. It is the URL's hash.

const KEYS = ["sheet", "position", "layer", "part", "head", "neuron", "find", "node", "path", "edges", "by"];

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
  read() {
    this.values = {};
    for (const [key, value] of new URLSearchParams(location.hash.slice(1))) {
      if (KEYS.includes(key) || /^(sort|find)\./.test(key)) this.values[key] = value;
    }
    for (const key of ["sheet", "position", "layer"]) {
      if (!/^\d+$/.test(this.values[key] ?? "0")) delete this.values[key];
    }
  },
  tell() {
    for (const listener of this.listeners) listener();
  },
};
