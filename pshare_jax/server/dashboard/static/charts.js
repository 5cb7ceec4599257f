
// Two kinds of chart: lines over the last minutes, and a bar divided into parts.

const EDGE = { left: 56, right: 10, top: 8, bottom: 22 };
const GAP_SECONDS = 15; // points further apart are not joined

/** `points`: [{ago, p50, p95, ended}], oldest first, in seconds; `span`: the seconds shown. */
function drawLines(svg, points, span, bucket) {
  const width = svg.clientWidth, height = svg.clientHeight;
  if (!width || !height) return; // hidden
  const top = Math.max(...points.map((point) => point.p95), 0.001);
  const step = niceStep(top / 3), highest = step * Math.ceil(top / step);
  const x = (ago) => EDGE.left + (1 - ago / span) * (width - EDGE.left - EDGE.right);
  const y = (value) => height - EDGE.bottom - (value / highest) * (height - EDGE.top - EDGE.bottom);
  const parts = [];
  for (let line = 0; line * step <= highest * 1.001; line++) {
    const at = y(line * step);
    parts.push(draw("line", { class: "grid", x1: EDGE.left, x2: width - EDGE.right, y1: at, y2: at }));
    const text = line ? duration(line * step) : "0";
    parts.push(draw("text", { x: EDGE.left - 8, y: at + 4, "text-anchor": "end" }, text));
  }
  const marks = width < 440 ? 2 : span % 300 ? 4 : 5;
  for (let mark = marks; mark >= 0; mark--) {
    const ago = (span * mark) / marks;
    const anchor = ago === 0 ? "end" : ago === span ? "start" : "middle";
    const text = ago ? (ago % 60 ? `${ago} s` : `${ago / 60} min`) : "now";
    parts.push(draw("text", { x: x(ago), y: height - 5, "text-anchor": anchor }, text));
  }
  for (const name of ["p95", "p50"]) {
    const path = points.map((point, index) => {
      const joined = index && points[index - 1].ago - point.ago <= GAP_SECONDS;
      return `${joined ? "L" : "M"}${x(point.ago).toFixed(1)} ${y(point[name]).toFixed(1)}`;
    });
    parts.push(draw("path", { class: name, d: path.join("") }));
    for (const point of points) parts.push(draw("circle", { class: name, cx: x(point.ago), cy: y(point[name]), r: 2.3 }));
  }
  const wide = Math.max((bucket / span) * (width - EDGE.left - EDGE.right), 4);
  for (const point of points) {
    const summary = `${age(point.ago)} ago: median ${duration(point.p50)}, 95th percentile ${duration(point.p95)}, ` +
      plural(point.ended, "request", "requests");
    const place = { x: x(point.ago) - wide / 2, y: EDGE.top, width: wide, height: height - EDGE.top - EDGE.bottom };
    parts.push(draw("rect", { class: "aim", ...place }, draw("title", {}, summary)));
  }
  svg.replaceChildren(...parts);
}

function niceStep(lowest) {
  const power = 10 ** Math.floor(Math.log10(lowest));
  return power * [1, 2, 5, 10].find((factor) => factor * power >= lowest);
}

/** A bar with its name and numbers; `parts`: [[class, number, label]]. */
function bar(name, parts) {
  const whole = parts.reduce((sum, part) => sum + part[1], 0);
  const summary = parts.map(([, number, label]) => `${count(number)} ${label}`).join(" · ");
  const svg = draw("svg", { role: "img", "aria-label": `${name}: ${summary}` });
  let before = 0;
  for (const [kind, number] of parts) {
    const place = { x: `${(100 * before) / whole}%`, width: `${(100 * number) / whole}%`, y: 0, height: 14 };
    if (number) svg.append(draw("rect", { class: kind, ...place }));
    before += number;
  }
  return make("div", { class: "bar" }, make("p", {}, make("span", {}, name), make("span", {}, summary)), svg);
}
