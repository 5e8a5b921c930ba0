// What keys and fingers mean: the five inputs of a joystick, put together to the game's actions.

const KEYS = {
  ArrowLeft: "left", ArrowRight: "right", ArrowUp: "up", ArrowDown: "down",
  KeyA: "left", KeyD: "right", KeyW: "up", KeyS: "down", Space: "fire",
};
const GLYPHS = { left: "←", up: "↑", right: "→", down: "↓", fire: "●" };
const DIAGONALS = { "↑→": "↗", "↑←": "↖", "↓→": "↘", "↓←": "↙" };

// The inputs that an action's name stands for ("uprightfire": up, right, fire); null if it is another kind of name.
function inputsOf(name) {
  const plain = name.toLowerCase().replace(/[^a-z]/g, "");
  if (/^(noop|stay|none|nothing|n)$/.test(plain)) return [];
  return /^(up|down|left|right|fire)+$/.test(plain) ? plain.match(/up|down|left|right|fire/g) : null;
}

export class Actions {
  constructor(names) {
    this.names = names;
    this.inputs = names.map(inputsOf);
    this.held = new Set();
    this.waits = Math.max(0, this.inputs.findIndex((inputs) => inputs?.length === 0));
    this.used = ["left", "up", "down", "right", "fire"].filter((input) => this.inputs.some((inputs) => inputs?.includes(input)));
  }

  // Buttons of the pad: [{input or action, label, place}]; actions with names of their own have a button each.
  buttons() {
    const own = this.names.map((name, action) => ({ action, label: name, place: "own" })).filter(({ action }) => this.inputs[action] === null);
    const waiting = this.inputs[this.waits]?.length === 0 ? [{ action: this.waits, label: this.names[this.waits], place: "wait" }] : [];
    return [...this.used.map((input) => ({ input, label: GLYPHS[input], place: input })), ...waiting, ...own];
  }

  // An action's name in a character or two, where it has one.
  glyph(action) {
    const inputs = this.inputs[action];
    if (!inputs?.length) return this.names[action];
    const glyphs = inputs.map((input) => GLYPHS[input]).join("");
    return glyphs.replace(/^[↑↓][←→]/, (pair) => DIAGONALS[pair]);
  }

  inputOf(code) {
    const input = KEYS[code];
    return this.used.includes(input) ? input : null;
  }

  // The action of a number key: actions with names of their own are numbered from 1.
  numbered(key) {
    const own = this.names.map((_, action) => action).filter((action) => this.inputs[action] === null);
    return own[Number(key) - 1] ?? null;
  }

  // The action for all inputs that are held, or for as many of them as the game knows together.
  current() {
    let best = this.waits;
    let most = 0;
    this.inputs.forEach((inputs, action) => {
      const fits = inputs !== null && inputs.length > most && inputs.every((input) => this.held.has(input));
      if (fits) [best, most] = [action, inputs.length];
    });
    return best;
  }
}
