// The moments that were played: a tree, in which every moment keeps the futures tried from it.

export class Tree {
  constructor() {
    this.moments = new Map();
    this.roots = [];
  }

  get(number) {
    return this.moments.get(number);
  }

  // Take in a moment (it may be there already), forget those older than `oldest`, and go to it.
  add(moment, oldest) {
    if (!this.moments.has(moment.number)) {
      this.moments.set(moment.number, { ...moment, children: [], next: null });
      const parent = this.moments.get(moment.parent);
      (parent ? parent.children : this.roots).push(moment.number);
    }
    this.choose(moment.number);
    for (const number of this.moments.keys()) {
      if (number >= oldest) break;
      this.forget(number);
    }
    return this.get(moment.number);
  }

  // Make the line through a moment the one that is followed.
  choose(number) {
    for (let child = this.get(number); ; ) {
      const parent = this.get(child.parent);
      if (!parent) return;
      parent.next = child.number;
      child = parent;
    }
  }

  forget(number) {
    const { children } = this.get(number);
    this.moments.delete(number);
    this.roots = this.roots.filter((root) => root !== number).concat(children);
    this.roots.sort((a, b) => a - b);
  }

  // The moments from `number` on, each followed by the future that was chosen last.
  line(number) {
    const line = [];
    for (let moment = this.get(number); moment; moment = this.get(moment.next)) line.push(moment.number);
    return line;
  }

  // All games one after another, each along the line chosen last.
  story() {
    return this.roots.flatMap((root) => this.line(root));
  }

  ancestors(number) {
    const found = [];
    for (let moment = this.get(number); moment; moment = this.get(moment.parent)) found.push(moment.number);
    return found;
  }

  // Lines that branch off the story: [{column, line}], where `column` is the place of a line's first moment.
  branches(story) {
    const found = [];
    const visit = (line, first) => {
      line.forEach((number, index) => {
        for (const child of this.get(number).children) {
          if (child === line[index + 1]) continue;
          const branch = { column: first + index + 1, line: this.line(child) };
          found.push(branch);
          visit(branch.line, branch.column);
        }
      });
    };
    visit(story, 0);
    return found;
  }

  // The newest future that leaves the line of a moment, at the moment or before it; null if there is none.
  otherFuture(number) {
    for (const each of this.ancestors(number)) {
      const moment = this.get(each);
      const others = moment.children.filter((child) => child !== moment.next);
      if (others.length) return Math.max(...others);
    }
    return null;
  }

  // Two futures from the last moment that they share: {fork, first: [...], second: [...]}; null if there is none.
  futures(first, second) {
    const before = new Set(this.ancestors(first));
    const fork = this.ancestors(second).find((number) => before.has(number));
    if (fork === undefined) return null;
    const after = (number) => {
      const path = this.ancestors(number);
      const shared = path.indexOf(fork);
      return [...path.slice(0, shared).reverse(), ...this.line(number).slice(1)];
    };
    return { fork, first: after(first), second: after(second) };
  }
}
