// A map of points on a canvas. Pixels are written into an image, which is fast enough for 50,000 points without a GPU
// (tests/test_browser.py times it). Lines and labels are drawn over it.
class PointMap {
  // `label(i)` is the text at a marked point; `hovered(i, x, y)`, or `hovered(null)`, and `chosen(i)` are called.
  constructor(canvas, { label, hovered, chosen }) {
    Object.assign(this, { canvas, label, hovered, chosen, context: canvas.getContext("2d"), waiting: false });
    this.layer = document.createElement("canvas");
    // Of each point its colour (ABGR) and whether it is shown; points that lie over the others; points with labels;
    // pairs with a line between them.
    Object.assign(this, { colours: [], shown: [], front: [], marked: [], lines: [] });
    this.setPoints([[], [], []], false);
    this.listen();
    new ResizeObserver(() => {
      canvas.width = Math.round(canvas.clientWidth * devicePixelRatio);
      canvas.height = Math.round(canvas.clientHeight * devicePixelRatio);
      this.draw();
    }).observe(canvas);
  }

  // Three coordinates of each point; `solid`: all three are shown, and the view can be turned.
  setPoints(axes, solid) {
    const size = axes[0].length;
    const ends = axes.map((axis) => axis.reduce(([low, high], x) => [Math.min(low, x), Math.max(high, x)], [0, 0]));
    const middle = ends.map(([low, high]) => (low + high) / 2);
    const extent = ends.map(([low, high]) => (high - low) / 2 || 1);
    Object.assign(this, { axes, solid, size, middle, extent, radius: Math.hypot(...extent) });
    [this.x, this.y, this.order] = [new Float32Array(size), new Float32Array(size), new Uint32Array(size)];
    this.reset();
  }

  reset() {
    this.view = { zoom: 1, x: 0, y: 0, yaw: 0, pitch: 0 };
    this.redraw();
  }

  redraw() {
    if (!this.waiting) requestAnimationFrame(() => this.draw());
    this.waiting = true;
  }

  draw() {
    this.waiting = false;
    if (!this.size || !this.canvas.width) return;
    this.project();
    this.paint();
    this.annotate();
  }

  // The width of a pixel in the space of the points. At zoom 1 all points fit, however the view is turned.
  perPixel() {
    const [x, y] = this.solid ? [0.85 * this.radius, 0.85 * this.radius] : this.extent;
    return (2.1 * Math.max(x / this.canvas.width, y / this.canvas.height)) / this.view.zoom;
  }

  // Positions on the screen, and in `order` the points from back to front (a counting sort of 256 layers).
  project() {
    const { axes: [X, Y, Z], middle: [mx, my, mz], view, solid, size, x, y, order } = this;
    const [scale, middleX, middleY] = [1 / this.perPixel(), this.canvas.width / 2, this.canvas.height / 2];
    const [cy, sy, cp, sp] = [Math.cos(view.yaw), Math.sin(view.yaw), Math.cos(view.pitch), Math.sin(view.pitch)];
    const [layer, starts] = [new Uint8Array(size), new Uint32Array(257)];
    for (let i = 0; i < size; i++) {
      let [across, up] = [X[i] - mx, Y[i] - my];
      if (solid) {
        const front = cy * (Z[i] - mz) - sy * across;
        across = cy * across + sy * (Z[i] - mz);
        layer[i] = 128 + 127 * ((sp * up + cp * front) / this.radius);
        up = cp * up - sp * front;
      }
      x[i] = middleX + scale * (across - view.x);
      y[i] = middleY - scale * (up - view.y);
      starts[layer[i] + 1]++;
    }
    for (let k = 0; k < 256; k++) starts[k + 1] += starts[k];
    for (let i = 0; i < size; i++) order[starts[layer[i]]++] = i;
  }

  paint() {
    const { width, height } = this.canvas;
    if (this.image?.width !== width || this.image.height !== height) {
      Object.assign(this.layer, { width, height });
      this.image = this.context.createImageData(width, height);
    }
    const pixels = new Uint32Array(this.image.data.buffer);
    pixels.fill(0);
    const least = this.size > 20000 ? 0.6 : 1.2; // many points are small
    const radius = Math.round(Math.min(5, least + Math.sqrt(this.view.zoom) * 0.5) * devicePixelRatio);
    const disc = [];
    for (let v = -radius; v <= radius; v++)
      for (let u = -radius; u <= radius; u++) if (u * u + v * v <= radius * radius + 1) disc.push(v * width + u);
    const dot = (i) => {
      const [x, y] = [Math.round(this.x[i]), Math.round(this.y[i])];
      if (!this.shown[i] || x < radius || y < radius || x >= width - radius || y >= height - radius) return;
      for (const offset of disc) pixels[y * width + x + offset] = this.colours[i];
    };
    this.order.forEach(dot);
    this.front.forEach(dot);
    this.layer.getContext("2d").putImageData(this.image, 0, 0);
    this.context.clearRect(0, 0, width, height);
    this.context.drawImage(this.layer, 0, 0); // putImageData would not print
  }

  annotate() {
    const { context, x, y } = this;
    const [unit, ink, page] = [devicePixelRatio, theme("--ink"), theme("--page")];
    context.strokeStyle = ink;
    context.lineWidth = unit;
    context.beginPath();
    for (const [from, to] of this.lines) {
      context.moveTo(x[from], y[from]);
      context.lineTo(x[to], y[to]);
    }
    context.stroke();
    context.font = `${13 * unit}px ui-monospace, "DejaVu Sans Mono", monospace`;
    context.textBaseline = "middle";
    const boxes = [];
    for (const i of this.marked) {
      const text = this.label(i);
      const width = context.measureText(text).width;
      const left = x[i] + 9 * unit + width < this.canvas.width ? x[i] + 7 * unit : x[i] - 7 * unit - width;
      context.beginPath();
      context.arc(x[i], y[i], 5 * unit, 0, 2 * Math.PI);
      context.stroke();
      const overlaps = ([bx, by, bw]) => Math.abs(by - y[i]) < 16 * unit && left < bx + bw && bx < left + width;
      if (boxes.some(overlaps)) continue;
      boxes.push([left, y[i], width]);
      context.fillStyle = page;
      context.fillRect(left - unit, y[i] - 8 * unit, width + 2 * unit, 16 * unit);
      context.fillStyle = ink;
      context.fillText(text, left, y[i]);
    }
  }

  // The nearest shown point within 14 pixels of the screen, or null.
  nearest(x, y) {
    let [found, least] = [null, (14 * devicePixelRatio) ** 2];
    for (let i = 0; i < this.size; i++) {
      const away = (this.x[i] - x) ** 2 + (this.y[i] - y) ** 2;
      if (this.shown[i] && away < least) [found, least] = [i, away];
    }
    return found;
  }

  // Zoom around (x, y) of the canvas.
  zoom(factor, x = this.canvas.width / 2, y = this.canvas.height / 2) {
    const before = this.perPixel();
    this.view.zoom = Math.min(Math.max(this.view.zoom * factor, 0.5), 200);
    this.view.x += (x - this.canvas.width / 2) * (before - this.perPixel());
    this.view.y -= (y - this.canvas.height / 2) * (before - this.perPixel());
    this.redraw();
  }

  move(dx, dy, turn) {
    if (turn) {
      this.view.yaw += dx * 0.008;
      this.view.pitch += dy * 0.008;
    } else {
      this.view.x -= dx * devicePixelRatio * this.perPixel();
      this.view.y += dy * devicePixelRatio * this.perPixel();
    }
    this.redraw();
  }

  // Bring a point into the middle.
  centre(i) {
    const [x, y] = [0, 1].map((axis) => this.axes[axis][i] - this.middle[axis]);
    Object.assign(this.view, { x, y, yaw: 0, pitch: 0, zoom: Math.max(this.view.zoom, 3) });
    this.redraw();
  }

  listen() {
    const { canvas } = this;
    const pointers = new Map();
    let travelled = 0;
    const place = (event) => [event.offsetX * devicePixelRatio, event.offsetY * devicePixelRatio];
    canvas.addEventListener("pointerdown", (event) => {
      canvas.setPointerCapture(event.pointerId);
      pointers.set(event.pointerId, event);
      travelled = 0;
    });
    canvas.addEventListener("pointermove", (event) => {
      const before = pointers.get(event.pointerId);
      if (!before) return this.hovered(this.nearest(...place(event)), event.offsetX, event.offsetY);
      const [dx, dy] = [event.clientX - before.clientX, event.clientY - before.clientY];
      travelled += Math.abs(dx) + Math.abs(dy);
      const other = [...pointers.values()].find((one) => one.pointerId !== event.pointerId);
      const apart = (one) => Math.hypot(one.clientX - other.clientX, one.clientY - other.clientY) || 1;
      if (other) this.zoom(apart(event) / apart(before), ...place(event));
      else this.move(dx, dy, this.solid && !event.shiftKey);
      pointers.set(event.pointerId, event);
    });
    canvas.addEventListener("pointerup", (event) => {
      pointers.delete(event.pointerId);
      const found = travelled < 5 ? this.nearest(...place(event)) : null;
      if (found !== null) this.chosen(found);
    });
    canvas.addEventListener("pointercancel", (event) => pointers.delete(event.pointerId));
    canvas.addEventListener("pointerleave", () => this.hovered(null));
    canvas.addEventListener("wheel", (event) => {
      if (document.activeElement !== canvas && !event.ctrlKey) return; // the page scrolls
      event.preventDefault();
      this.zoom(Math.exp(-event.deltaY * 0.002), ...place(event));
    }, { passive: false });
    canvas.addEventListener("keydown", (event) => {
      const step = { ArrowLeft: [40, 0], ArrowRight: [-40, 0], ArrowUp: [0, 40], ArrowDown: [0, -40] }[event.key];
      const factor = { "+": 1.5, "=": 1.5, "-": 1 / 1.5 }[event.key];
      if (step) this.move(...step, this.solid && !event.shiftKey);
      else if (factor) this.zoom(factor);
      else return;
      event.preventDefault();
    });
  }
}
