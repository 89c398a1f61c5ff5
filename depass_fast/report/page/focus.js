// The focus stays where it is when a part of the page is drawn anew: what takes the focused element's place has it.

const SCOPES = "[data-table], [id]"; // within one of these an element is known by its name
const REACHED = 'button, select, input, [tabindex="0"]';

const calledBy = (element) =>
  element.dataset.grid ?? element.dataset.position ?? element.getAttribute("aria-label") ?? element.textContent;
const reachedIn = (scope) =>
  [...scope.querySelectorAll(REACHED)].filter((one) => one.tabIndex >= 0 && !one.closest("[hidden]"));
const selectorOf = (scope) => (scope.id ? `#${CSS.escape(scope.id)}` : `[data-table="${scope.dataset.table}"]`);

// where an element stands: in each scope, from the inmost outwards, its name, its turn among its namesakes, its place
function standing(element) {
  const found = [];
  for (let scope = element.closest(SCOPES); scope; scope = scope.parentElement?.closest(SCOPES)) {
    const all = reachedIn(scope),
      name = calledBy(element);
    const turn = all.filter((one) => calledBy(one) === name).indexOf(element);
    found.push({ selector: selectorOf(scope), isItself: scope === element, name, turn, at: all.indexOf(element) });
  }
  return found;
}

// what stands there now: the namesake, or what has come into its place; nothing in a scope that is empty
function standingIn({ selector, isItself, name, turn, at }) {
  const scope = document.querySelector(selector);
  if (!scope || isItself) return scope;
  const all = reachedIn(scope);
  const namesake = all.filter((one) => calledBy(one) === name)[turn];
  return namesake ?? all[Math.min(at, all.length - 1)] ?? (scope.hasAttribute("tabindex") ? scope : null);
}

function keepingFocus(run) {
  const had = document.activeElement;
  const places = had && had !== document.body ? standing(had) : [];
  run();
  if (document.activeElement !== document.body && document.activeElement !== null) return;
  if (had?.isConnected) return had.focus({ preventScroll: true });
  for (const place of places) {
    const found = standingIn(place);
    if (found) return found.focus({ preventScroll: true });
  }
}
