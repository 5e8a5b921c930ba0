// Draws one moment: the two screens with what is told below them, and the bars of what the agent expects.

const $ = (selector, within = document) => within.querySelector(selector);

export const signed = (number) => (number > 0 ? "+" : number < 0 ? "−" : "") + Number(Math.abs(number).toPrecision(4));
const percent = (chance) => `${Math.round(100 * chance)} %`;

export function element(tag, attributes = {}, ...children) {
  const made = Object.assign(document.createElement(tag), attributes);
  made.append(...children);
  return made;
}

// What a screen shows: {title, about, view, inset, veil, first, second, differs}.
export function drawScreen(figure, screen, showTokens) {
  $(".title", figure).textContent = screen.title;
  $(".about", figure).textContent = screen.about;
  const image = $("img", figure);
  image.src = screen.view.frame;
  image.alt = `${screen.title}: ${screen.first}`;
  const inset = $(".inset", figure);
  inset.hidden = !screen.inset;
  if (screen.inset) inset.src = screen.inset.frame;
  const veil = $(".veil", figure);
  veil.hidden = !screen.veil;
  veil.textContent = screen.veil ?? "";
  $(".first", figure).textContent = screen.first;
  $(".second", figure).textContent = screen.second;
  const tokens = $(".tokens", figure);
  tokens.hidden = !showTokens || Boolean(screen.veil);
  if (!tokens.hidden) drawTokens(tokens, screen.view.tokens, screen.differs);
}

// The tokens over the frame; those that differ from the other screen's are marked.
function drawTokens(grid, tokens, others) {
  const side = Math.sqrt(tokens.length);
  if (grid.childElementCount !== tokens.length) {
    grid.style.setProperty("--side", side);
    grid.replaceChildren(...tokens.map(() => element("span")));
  }
  tokens.forEach((token, place) => {
    const cell = grid.children[place];
    cell.textContent = token;
    cell.classList.toggle("differs", others !== null && others[place] !== token);
  });
}

export function gameScreen(moment) {
  const { game, dream } = moment;
  if (!game) {
    return { title: "The game", about: "nobody knows", view: dream, veil: moment.why_unknown, first: "", second: "", differs: null };
  }
  const reward = game.reward ? `, reward ${signed(game.reward)}` : "";
  return {
    title: "The game",
    about: "what really happens",
    view: game,
    veil: game.over ? "Game over." : null,
    first: `return ${signed(game.total)}${reward}`,
    second: "",
    differs: dream.over ? null : dream.tokens,
  };
}

export function dreamScreen(moment) {
  const { game, dream } = moment;
  const reward = dream.reward ? `, reward ${signed(dream.reward)}` : "";
  return {
    title: "The dream",
    about: "what the agent imagines",
    view: dream,
    veil: dream.over ? "The dream ends here." : null,
    first: dream.steps === 0 ? "has just seen the game" : `return ${signed(dream.total)}${reward}`,
    second: dreamt(dream, game),
    differs: game?.tokens ?? null,
  };
}

function dreamt(dream, game) {
  if (dream.over) return game && !game.over ? "“Dream from here” shows it the game" : "";
  if (dream.steps === 0) return "";
  const slept = `${dream.steps} ${dream.steps === 1 ? "step" : "steps"} asleep`;
  if (!game) return slept;
  const agreeing = dream.tokens.filter((token, place) => token === game.tokens[place]).length;
  return `${slept} · ${agreeing} of ${dream.tokens.length} tokens agree`;
}

// A future beside another one: its dream, and its game as an inset.
export function futureScreen(moment, name, other, atEnd) {
  const screen = dreamScreen(moment);
  return {
    ...screen,
    title: name,
    about: atEnd ? "goes no further yet" : "game in the corner",
    inset: moment.game,
    second: moment.game ? `game: return ${signed(moment.game.total)}${moment.game.over ? ", over" : ""}` : "",
    differs: other.dream.tokens,
  };
}

// The bars: the policy of both sides, and what the world model forecast of the step that led here.
export function drawReadout(names, first, second, actions) {
  $("#first-name").textContent = first.name;
  $("#second-name").textContent = second.name;
  const policy = names.map((name, action) =>
    barRow(name, first.view?.policy[action], second.view?.policy[action], actions.has(action)));
  $("#policy").replaceChildren(...policy);
  $("#forecast").replaceChildren(
    valueRow(first.view, second.view),
    ...[first, second].filter(({ dream }) => dream).flatMap(({ dream, name }) => forecastRows(dream, first.dream && second.dream ? name : "")),
  );
}

function barRow(name, first, second, taken) {
  const bar = (chance, kind) => {
    const made = element("div", { className: `chance ${kind}` }, element("i"), element("output", { textContent: chance === undefined ? "–" : percent(chance) }));
    made.firstChild.style.width = `${100 * (chance ?? 0)}%`;
    return made;
  };
  return element("div", { className: taken ? "bars taken" : "bars" }, element("span", { textContent: name }), element("div", {}, bar(first, "first"), bar(second, "second")));
}

function valueRow(first, second) {
  const told = (view) => (view ? signed(Number(view.value.toFixed(2))) || "0" : "–");
  return element("div", { className: "number" }, element("span", { textContent: "value", title: "the discounted return that the agent expects from here" }),
    element("b", { className: "first", textContent: told(first) }), element("b", { className: "second", textContent: told(second) }));
}

function forecastRows(dream, name) {
  const of = name ? ` (${name})` : "";
  if (dream.end_chance === null) return [];
  const reward = element("div", { className: "split", title: dream.reward_chances.map((chance, sign) => `${"−0+"[sign]}: ${percent(chance)}`).join(", ") });
  dream.reward_chances.forEach((chance, sign) => {
    const part = element("i", { className: ["minus", "zero", "plus"][sign], textContent: chance >= 0.24 ? `${["−", "0", "+"][sign]} ${percent(chance)}` : "" });
    part.style.width = `${100 * chance}%`;
    reward.append(part);
  });
  const end = element("div", { className: "chance end" }, element("i"), element("output", { textContent: percent(dream.end_chance) }));
  end.firstChild.style.width = `${100 * dream.end_chance}%`;
  return [
    element("div", { className: "bars" }, element("span", { textContent: `reward${of}` }), reward),
    element("div", { className: "bars" }, element("span", { textContent: `the end${of}` }), element("div", {}, end)),
  ];
}
