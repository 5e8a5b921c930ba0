// The connection to the server: one answer to each request, in the order of the requests.

export class Link {
  // heard(about): the server's first words; lost(): the connection has ended.
  constructor(heard, lost) {
    this.waiting = [];
    this.film = null;
    this.socket = new WebSocket(`ws://${location.host}/play`);
    this.socket.binaryType = "arraybuffer";
    this.socket.onmessage = ({ data }) => this.hear(data, heard);
    this.socket.onclose = () => {
      this.waiting.splice(0).forEach(({ reject }) => reject(new Error("The server is gone.")));
      lost();
    };
  }

  ask(request) {
    return new Promise((resolve, reject) => {
      if (this.socket.readyState !== WebSocket.OPEN) return reject(new Error("The server is gone."));
      this.waiting.push({ resolve, reject });
      this.socket.send(JSON.stringify(request));
    });
  }

  hear(data, heard) {
    if (data instanceof ArrayBuffer) {
      const { name, resolve } = this.film;
      return resolve({ name, data });
    }
    const answer = JSON.parse(data);
    if (answer.about) return heard(answer.about);
    const next = this.waiting.shift() ?? { reject: (error) => heard({ error: error.message }) };
    if (answer.error) next.reject(new Error(answer.error));
    else if (answer.film) this.film = { name: answer.film, resolve: next.resolve };
    else next.resolve(answer);
  }
}
