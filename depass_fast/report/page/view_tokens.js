// The prompt, token by token; a click chooses a position, by which all that follows is filtered.

views.tokens = (view, sheet, page) => {
  const shares = new Map(view.group.rows),
    hasShares = shares.size > 0;
  const largest = sizeOf([...shares.values()]);
  const unit = view.unit ?? sheet.unit,
    word = view.word ?? "share",
    format = formatter(largest, unit, view.word);
  const isLong = sheet.tokens.length > 80;
  const items = sheet.tokens.map((text, n) => {
    const units = shares.get(n),
      isRead = n === sheet.position;
    const said = [
      `position ${n}`,
      tokenName(sheet, n),
      ...(sheet.shown[n] === undefined ? [] : [`the bytes ${text}`]),
      ...(units === undefined ? [] : [`${word} ${format(units)}`]),
      ...(isRead ? [view.word ? "looks from here" : "read here"] : []),
    ];
    return h(
      "button",
      {
        type: "button",
        class: `token${isRead ? " read" : ""}`,
        "data-position": n,
        "aria-pressed": "false",
        "aria-label": said.join(", "),
        title: said.join(", "),
        style: { background: shade(units, largest, view.word && "accent") },
        onclick: () => state.set({ position: state.number("position") === n ? null : n }),
      },
      h("bdi", { class: "text" }, tokenText(sheet, n)),
      isLong || !hasShares
        ? null
        : h("span", { class: "share", "aria-hidden": "true" }, units === undefined ? "·" : format(units)),
    );
  });
  const strip = h(
    "div",
    {
      class: `strip${isLong ? " long" : ""}`,
      role: "toolbar",
      "aria-label": "The prompt's tokens",
      dir: sheet.direction,
    },
    ...items,
  );
  roving(strip, items, isLong ? 20 : 8, () => state.set({ position: null }));
  const label = (n) => `${tokenName(sheet, n)}@${n}`;
  const foot = footOf(view.group).map((one) => ({ ...one, label: view[one.label] ?? one.label }));
  const parts = [{ label: counted(shares.size, "token"), units: sumOf([...shares.values()]), always: true }, ...foot];
  const rows = view.group.rows.map(([n, units]) => ({ n, label: label(n), units }));
  const picture = () => {
    const order = [...rows].sort((a, b) => Math.abs(b.units) - Math.abs(a.units));
    const shown = order.slice(0, 40).sort((a, b) => a.n - b.n),
      hidden = order.slice(40);
    const left = hidden.length
      ? [{ label: counted(hidden.length, "other token"), units: sumOf(hidden.map((row) => row.units)) }]
      : [];
    const lines = [sheet.headline, `sum ${exactly(view.group.total, unit)}`, ...warningsOf(sheet)];
    return barsPicture(shown, [...left, ...foot], unit, word, lines);
  };
  let pressed = null; // the others are left alone: there may be thousands
  reacting(page, ["position"], () => {
    items[pressed]?.setAttribute("aria-pressed", "false");
    pressed = state.number("position");
    items[pressed]?.setAttribute("aria-pressed", "true");
  });
  const hasMap = sheet.views.some((one) => one.kind === "map"),
    more = hasMap ? " Choose one to see its position in what follows." : "";
  return card(
    {
      id: "tokens",
      title: view.title ?? "Tokens",
      lead:
        view.lead ?? (hasShares ? `The share of every token.${more}` : "The prompt. Shares are in the table below."),
      tools: hasShares ? exportButtons("tokens", picture) : [],
    },
    strip,
    hasShares
      ? sumLine(parts, view.group.total, { ...sheet, unit }, view.word ? { unsigned: true } : { value: sheet.value })
      : null,
  );
};
