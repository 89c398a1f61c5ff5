// The prompt, token by token; a click chooses a position, by which all that follows is filtered.

views.tokens = (view, sheet, page) => {
  const shares = new Map(view.group.rows), hasShares = shares.size > 0;
  const largest = sizeOf([...shares.values()]);
  const format = formatter(largest, sheet.unit);
  const isLong = sheet.tokens.length > 80;
  const items = sheet.tokens.map((text, n) => {
    const units = shares.get(n), isRead = n === sheet.position;
    const said = [`position ${n}`, quoted(text), ...(units === undefined ? [] : [`share ${format(units)}`]), ...(isRead ? ["read here"] : [])];
    return h("button", { type: "button", class: `token${isRead ? " read" : ""}`, "data-position": n, "aria-label": said.join(", "),
      title: said.join(", "), style: { background: shade(units, largest) },
      onclick: () => state.set({ position: state.number("position") === n ? null : n }) },
    h("bdi", { class: "text" }, visible(text)),
    isLong || !hasShares ? null : h("span", { class: "share", "aria-hidden": "true" }, units === undefined ? "·" : format(units)));
  });
  const strip = h("div", { class: `strip${isLong ? " long" : ""}`, role: "toolbar", "aria-label": "The prompt's tokens", dir: sheet.direction }, ...items);
  roving(strip, items, isLong ? 20 : 8);
  const label = (n) => `${quoted(sheet.tokens[n])}@${n}`;
  const parts = [{ label: `${shares.size} tokens`, units: sumOf([...shares.values()]), always: true }, ...footOf(view.group)];
  const rows = view.group.rows.map(([n, units]) => ({ n, label: label(n), units }));
  const picture = () => {
    const order = [...rows].sort((a, b) => Math.abs(b.units) - Math.abs(a.units));
    const shown = order.slice(0, 40).sort((a, b) => a.n - b.n), hidden = order.slice(40);
    const left = hidden.length ? [{ label: `${hidden.length} other tokens`, units: sumOf(hidden.map((row) => row.units)) }] : [];
    return { spec: barsSpec([...shown, ...left, ...footOf(view.group)], sheet.unit),
      lines: [sheet.headline, `sum ${exactly(view.group.total, sheet.unit)}`, ...warningsOf(sheet)] };
  };
  reacting(page, ["position"], () => {
    const chosen = state.number("position");
    items.forEach((item, n) => item.setAttribute("aria-pressed", String(n === chosen)));
  });
  return card({
    id: "tokens", title: "Tokens",
    lead: hasShares ? "The share of every token. Choose one to see what is written at its position." : "The prompt. Shares are in the table below.",
    tools: hasShares ? exportButtons("tokens", picture) : [],
  }, strip, hasShares ? sumLine(parts, view.group.total, sheet, { value: sheet.value }) : null);
};
