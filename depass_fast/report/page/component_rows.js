// Which components are listed, and what they add up to: those of a layer, of a position, or that read a head.

const PARTS = { heads: "attention", neurons: "mlp" };
const rowsOf = (rows) => rows.map(([label, units]) => ({ label, units }));

function componentRows(view, sheet, page) {
  const kind = view.id,
    isLayered = view.groups.length > 1;
  const map = page.sheet.views.find((one) => one.kind === "map");
  const part = map?.parts.find((one) => one.name === PARTS[kind]);
  const byLayer = new Map(view.groups.map((group) => [group.layer, group]));
  const totals = new Map([...view.groups.flatMap((group) => group.rows), ...Object.entries(view.totals ?? {})]);
  const readings = view.readings ?? {};
  const placesOf = (label) => pairs(view.places?.[label]);
  const at = (label, position) => placesOf(label).find(([n]) => n === position)?.[1];

  // which layer and position hold here: those of the map, unless they were chosen in its other part
  const filter = () => {
    const other = state.get("part"),
      mine = !map || other === PARTS[kind] || !Object.values(PARTS).includes(other);
    const layer = mine ? state.number("layer") : null;
    return { layer: byLayer.has(layer) ? layer : null, position: view.places ? state.number("position") : null };
  };
  // the head whose readers are listed
  const readHead = () => (kind === "neurons" && Object.keys(readings).length ? state.get("head") : null);

  const readersOf = (head) => {
    const rows = Object.entries(readings).flatMap(([label, one]) =>
      one.writers.filter(([writer]) => writer === head).map(([, units]) => ({ label, units })),
    );
    const [count, total] = view.read_from[head] ?? [0, 0];
    const others = { label: counted(count - rows.length, "other"), units: total - sumOf(rows.map((row) => row.units)) };
    const looked = counted(Object.keys(readings).length, "leading neuron");
    return {
      rows,
      total,
      totalName: `taken from ${head}`,
      isOwn: true,
      foot: count > rows.length ? [others] : [],
      note:
        `Neurons of all layers that read ${head} directly, by what they take from it where their shares are largest. ` +
        `The ${looked} ${Object.keys(readings).length === 1 ? "was" : "were"} looked at.`,
    };
  };

  const cellTotal = (layer, position) => {
    const i = map?.positions.indexOf(position) ?? -1,
      row = part?.rows.find((one) => one.layer === layer);
    return i < 0 || !row ? null : row.cells[i];
  };
  const atPosition = (layer, position) => {
    const rows = Object.keys(view.places)
      .filter((label) => layer === null || layerOf(label) === layer)
      .map((label) => ({ label, units: at(label, position) }))
      .filter((row) => row.units !== undefined);
    const where = `${tokenName(sheet, position)} at position ${position}`;
    if (layer === null)
      return {
        rows,
        foot: [],
        total: null,
        says: `the ${kind} of a layer sum to its cell in the map: choose a layer to see it`,
        note: `All layers, ${where}. Layers overlap: choose one to see its sum.`,
      };
    const total = cellTotal(layer, position);
    if (total === null)
      return {
        rows,
        foot: [],
        total,
        says: "the sum of this position is among the others of the map",
        note: `Layer ${layer}, ${where}. The position is among the others of the map.`,
      };
    const left = total - sumOf(rows.map((row) => row.units));
    return {
      rows,
      total,
      totalName: `${part?.title ?? "all"} of layer ${layer} here`,
      isOwn: true,
      foot: left === 0 ? [] : [{ label: "others", units: left, isRounding: true }],
      note: `Layer ${layer}, ${where}.`,
    };
  };

  const everyRow = () => rowsOf(view.groups.flatMap((one) => one.rows));
  const added = () => ({
    rows: everyRow(),
    foot: ["rest", "bias"]
      .filter((name) => view.groups.some((one) => one[name] !== null))
      .map((name) => ({ label: name, units: sumOf(view.groups.map((one) => one[name] ?? 0)) })),
    total: sumOf(view.groups.map((one) => one.total)),
    note: "",
  });
  const ofGroup = (group) => ({
    rows: rowsOf(group.rows),
    foot: footOf(group),
    total: group.total,
    group,
    note: group.layer === null ? "" : `Layer ${group.layer}.`,
  });
  const ofAllLayers = () => ({
    rows: everyRow(),
    foot: [],
    total: null,
    note: "Of all layers. Layers overlap: choose one to see its sum.",
  });

  // the rows that are shown, what stands under them, and the sum where there is one; `isOwn`: it is not the target's
  const selection = () => {
    const { layer, position } = filter();
    if (readHead()) return readersOf(readHead());
    if (position !== null) return atPosition(layer, position);
    if (layer === null && view.adds) return added();
    const group = layer === null && isLayered ? null : (byLayer.get(layer) ?? view.groups[0]);
    return group ? ofGroup(group) : ofAllLayers();
  };
  return { map, totals, readings, placesOf, at, filter, readHead, selection, isLayered };
}

// [n, units, n, units, ...] as pairs
const pairs = (flat = []) => Array.from({ length: flat.length / 2 }, (_, i) => [flat[2 * i], flat[2 * i + 1]]);
