// The ablation explorer: an index of studies (index.py) as figures in SVG. The same module runs under a kernel
// (anywidget calls `render`) and in a page without one (`showIndex`).
//
// An arm is a combination of choices, one value for each axis. The switch is the axis that is flipped, from its value A
// to its value B; `at` holds a value for every other axis: the panel in focus.

// --- statistics: those of pixnerd/studies/compare.py, from the same random numbers ---------------------------------

const RESAMPLES = 10000;
const EXACT = 16; // pairs up to which every assignment of signs is counted
const SURE = 0.05; // p up to which a difference is decided, if its interval leaves out 0 as well

// numpy.random.default_rng(0): the state and the increment of its PCG64
const STATE = 35399562948360463058890781895381311971n;
const INCREMENT = 87136372517582989555478159403783844777n;
const MULTIPLIER = 47026247687942121848144207491837523525n;
const BITS_64 = (1n << 64n) - 1n;
const BITS_128 = (1n << 128n) - 1n;

/** The whole numbers below `high` that numpy.random.default_rng(0).integers(high, size=count) draws. */
export function seededIntegers(high, count) {
  let state = STATE;
  let waiting = null; // the upper half of a drawn 64-bit number
  const draw = () => {
    if (waiting !== null) {
      const half = waiting;
      waiting = null;
      return half;
    }
    state = (state * MULTIPLIER + INCREMENT) & BITS_128;
    const mixed = (state >> 64n) ^ (state & BITS_64);
    const turn = state >> 122n;
    const word = ((mixed >> turn) | (mixed << (64n - turn))) & BITS_64;
    waiting = Number(word >> 32n);
    return Number(word & 0xffffffffn);
  };
  const found = new Uint32Array(count);
  const refused = (2 ** 32 - high) % high;
  for (let i = 0; i < count; i++) {
    let product = high === 1 ? 0 : draw() * high;
    while (high > 1 && product % 2 ** 32 < refused) product = draw() * high;
    found[i] = Math.floor(product / 2 ** 32);
  }
  return found;
}

const drawn = new Map();

/** The same numbers, drawn once. */
function integers(high, count) {
  const key = `${high} ${count}`;
  if (!drawn.has(key)) drawn.set(key, seededIntegers(high, count));
  return drawn.get(key);
}

const mean = (values) => values.reduce((sum, value) => sum + value, 0) / values.length;

/** The value that would stand at a place of the sorted array, which is rearranged (Hoare's quickselect). */
function nth(values, place) {
  let [low, high] = [0, values.length - 1];
  while (low < high) {
    const middle = values[(low + high) >> 1];
    let [i, j] = [low, high];
    while (i <= j) {
      while (values[i] < middle) i++;
      while (values[j] > middle) j--;
      if (i <= j) [values[i++], values[j--]] = [values[j], values[i]];
    }
    if (place <= j) high = j;
    else if (place >= i) low = i;
    else break;
  }
  return values[place];
}

function quantile(values, share) {
  const place = share * (values.length - 1);
  const below = nth(values, Math.floor(place));
  const above = nth(values, Math.ceil(place));
  return below + (place - Math.floor(place)) * (above - below);
}

/** The percentile interval, 95 %, of the mean of differences under resampling. */
export function bootstrapInterval(differences) {
  const count = differences.length;
  const chosen = integers(count, RESAMPLES * count);
  const means = new Float64Array(RESAMPLES);
  for (let i = 0, place = 0; i < RESAMPLES; i++) {
    let sum = 0;
    for (let j = 0; j < count; j++) sum += differences[chosen[place++]];
    means[i] = sum / count;
  }
  return [quantile(means, 0.025), quantile(means, 0.975)];
}

const signs = new Map();

/** The assignments of signs to `count` differences, one after the other: every one up to 16, else seeded ones. */
function signsFor(count) {
  if (!signs.has(count)) {
    const bits =
      count > EXACT
        ? integers(2, RESAMPLES * count)
        : Uint8Array.from({ length: 2 ** count * count }, (_, i) => (Math.floor(i / count) >> (i % count)) & 1);
    const factors = Int8Array.from(bits, (bit) => 1 - 2 * bit);
    signs.set(count, factors);
  }
  return signs.get(count);
}

/** The two-sided p of differences under random signs: exact up to 16 of them. */
export function signFlipP(differences) {
  const count = differences.length;
  const factors = signsFor(count);
  const trials = factors.length / count;
  const observed = Math.abs(mean(differences)) * (1 - 1e-12);
  let asFar = 0;
  for (let trial = 0, place = 0; trial < trials; trial++) {
    let sum = 0;
    for (let j = 0; j < count; j++) sum += factors[place++] * differences[j];
    if (Math.abs(sum / count) >= observed) asFar++;
  }
  return count <= EXACT ? asFar / trials : (asFar + 1) / (trials + 1);
}

const compared = new Map();

/** What pairs [{seed, a, b}] say of b − a: mean, low, high, p, pairs, seeds; null if there is none. */
export function compare(pairs) {
  if (!pairs.length) return null;
  const differences = pairs.map((pair) => pair.b - pair.a);
  const seeds = new Set(pairs.map((pair) => pair.seed)).size;
  const key = `${seeds}:${differences.join()}`;
  if (!compared.has(key)) {
    const [low, high] = bootstrapInterval(differences);
    const found = { mean: mean(differences), low, high, p: signFlipP(differences), pairs: pairs.length, seeds };
    compared.set(key, found);
  }
  return compared.get(key);
}

/** "better", "worse", "higher", "lower", "no difference" or "undecided with N seeds", as in ablations.py. */
export function verdict(found, measure) {
  if (found.mean === 0 && found.low === 0 && found.high === 0) return "no difference";
  if (!measure.counted && (found.p > SURE || (found.low <= 0 && found.high >= 0))) {
    return `undecided with ${found.seeds} ${found.seeds === 1 ? "seed" : "seeds"}`;
  }
  const side = found.mean > 0 ? "higher" : "lower";
  if (!measure.better) return side;
  return side === measure.better ? "better" : "worse";
}

// --- a selection of the index ----------------------------------------------------------------------------------------

const armOf = (study, choices) =>
  Object.keys(study.axes)
    .map((axis) => choices[axis])
    .join("-");
const choicesOf = (study, run) => Object.fromEntries(Object.keys(study.axes).map((axis, i) => [axis, run.choices[i]]));
const agrees = (choices, fixed) => Object.entries(fixed).every(([axis, value]) => choices[axis] === value);

const byArm = new WeakMap(); // study → its runs by arm

/** Every run of an arm: seed → run. */
function runsOf(study, choices) {
  if (!byArm.has(study))
    byArm.set(
      study,
      grouped(study.runs, (run) => run.choices.join("\n")),
    );
  const key = Object.keys(study.axes)
    .map((axis) => choices[axis])
    .join("\n");
  return new Map((byArm.get(study).get(key) ?? []).map((run) => [run.repeat, run]));
}

function grouped(items, keyOf) {
  const groups = new Map();
  for (const item of items) {
    const key = keyOf(item);
    if (!groups.has(key)) groups.set(key, []);
    groups.get(key).push(item);
  }
  return groups;
}

/** The pairs of a measure between the values A and B of the switch, where all other axes are `fixed`. */
export function pairsOf(study, selection, fixed, measure = selection.measure) {
  const { axis, a, b } = selection;
  const after = runsOf(study, { ...fixed, [axis]: b });
  const pairs = [];
  for (const [seed, run] of runsOf(study, { ...fixed, [axis]: a })) {
    const values = [run.measures[measure], after.get(seed)?.measures[measure]];
    if (values.every((value) => value !== undefined)) pairs.push({ seed, a: values[0], b: values[1] });
  }
  return pairs;
}

/** The panels of a selection, row by row: {fixed, row, column}. */
export function panelsOf(study, selection) {
  const { axis, a, b, columns, rows, at } = selection;
  if (study.loose) return contextsOf(study, axis, a, b).map((fixed) => ({ fixed, row: "", column: "" }));
  const panels = [];
  for (const row of rows ? study.axes[rows] : [""]) {
    for (const column of columns ? study.axes[columns] : [""]) {
      const fixed = { ...at, ...(rows && { [rows]: row }), ...(columns && { [columns]: column }) };
      panels.push({ fixed, row, column });
    }
  }
  return panels;
}

const MOST = 12; // panels of runs that belong to no study

/** All that two runs share which differ in the switch alone, where it is most shared first. */
function contextsOf(study, axis, a, b) {
  const rest = (run) => ({ ...choicesOf(study, run), [axis]: "" });
  const groups = grouped(study.runs, (run) => JSON.stringify(rest(run)));
  const found = [];
  for (const [key, runs] of groups) {
    const fixed = JSON.parse(key);
    delete fixed[axis];
    const place = Object.keys(study.axes).indexOf(axis);
    const seeds = (value) => new Set(runs.filter((run) => run.choices[place] === value).map((run) => run.repeat));
    const shared = [...seeds(a)].filter((seed) => seeds(b).has(seed)).length;
    if (shared) found.push({ fixed, shared });
  }
  return found
    .sort((one, two) => two.shared - one.shared)
    .slice(0, MOST)
    .map(({ fixed }) => fixed);
}

/** A selection with every part that is missing, or that the index does not have, replaced by the first that it has. */
export function completed(index, wanted) {
  const made = index.studies.find((entry) => entry.runs.length) ?? index.studies[0];
  const study = index.studies.find((entry) => entry.name === wanted.study) ?? made;
  const has = (name) => study.runs.some((run) => name in run.measures);
  const names = Object.keys(index.measures).filter(has);
  const measure = names.includes(wanted.measure) ? wanted.measure : names[0];
  const axes = Object.keys(study.axes);
  const axis = axes.includes(wanted.axis) ? wanted.axis : (axes.find((name) => study.axes[name].length > 1) ?? axes[0]);
  const values = axis ? study.axes[axis] : [];
  const a = values.includes(wanted.a) ? wanted.a : values.find((value) => value !== wanted.b);
  const b = values.includes(wanted.b) && wanted.b !== a ? wanted.b : values.find((value) => value !== a);
  const others = study.loose ? [] : axes.filter((name) => name !== axis);
  const pick = (name, free) => (name === "none" || free.includes(name) ? name : (free[0] ?? "none"));
  const columns = pick(wanted.columns, others);
  const rows = pick(
    wanted.rows,
    others.filter((name) => name !== columns),
  );
  let at = {};
  if (study.loose) {
    const contexts = contextsOf(study, axis, a, b);
    at = contexts.find((fixed) => agrees(wanted.at ?? {}, fixed)) ?? contexts[0] ?? {};
  }
  for (const name of others) {
    const value = wanted.at?.[name];
    at[name] = study.axes[name].includes(value) ? value : study.axes[name].at(-1);
  }
  const plain = (name) => (name === "none" ? "" : name);
  return { study: study.name, measure, axis, a, b, columns: plain(columns), rows: plain(rows), at };
}

/** The shell command that makes all runs on both sides of a selection, as in ablations.py. */
export function commandOf(study, { axis, a, b }, fixed) {
  const chosen = [...study.runs, ...study.missing]
    .filter((run) => {
      const choices = choicesOf(study, run);
      return [a, b].includes(choices[axis]) && agrees(choices, fixed);
    })
    .sort((one, two) => one.index - two.index);
  if (study.loose) return chosen.map((run) => run.command).join("\n");
  const file = study.file || `${study.name}.yaml`;
  const quoted = /^[\w@%+=:,./-]+$/.test(file) ? file : `'${file.replaceAll("'", `'"'"'`)}'`;
  return `pixnerd sweep ${quoted} --index ${chosen.map((run) => run.index).join(" ")}`;
}

/** Those of points {x, y} that no other beats in both: x low, and y low or high. */
export function frontier(points, better) {
  const sign = better === "lower" ? 1 : -1;
  const sorted = [...points].sort((one, two) => one.x - two.x || sign * (one.y - two.y));
  let best = Infinity;
  return sorted.filter((point) => {
    if (sign * point.y >= best) return false;
    best = sign * point.y;
    return true;
  });
}

// --- the selection in the page's address -----------------------------------------------------------------------------

const PARTS = { study: "study", measure: "measure", switch: "axis", a: "a", b: "b", columns: "columns", rows: "rows" };

export function toAddress(selection) {
  const entries = Object.entries(PARTS).map(([name, part]) => [name, selection[part] || "none"]);
  for (const [axis, value] of Object.entries(selection.at)) entries.push([`at.${axis}`, value]);
  return `#${new URLSearchParams(entries)}`;
}

export function fromAddress(hash) {
  const wanted = { at: {} };
  if (!hash.includes("=")) return wanted;
  for (const [name, value] of new URLSearchParams(hash.slice(1))) {
    if (name in PARTS) wanted[PARTS[name]] = value;
    if (name.startsWith("at.")) wanted.at[name.slice(3)] = value;
  }
  return wanted;
}

// --- small tools -----------------------------------------------------------------------------------------------------

const SVG = "http://www.w3.org/2000/svg";

const TAKES_KEYS = ["button", "input", "select", "summary"];

/** An element: attributes by name, functions for events (onclick), then children. */
function make(tag, attributes = {}, ...children) {
  const node = tag.startsWith("svg:") ? document.createElementNS(SVG, tag.slice(4)) : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    if (typeof value === "function") node.addEventListener(name.slice(2), value);
    else node.setAttribute(name, value === true ? "" : value);
  }
  if (TAKES_KEYS.includes(tag) || "tabindex" in attributes) {
    node.dataset.lmSuppressShortcuts = "true"; // or JupyterLab would take the keys for its own: "b" inserts a cell
  }
  node.append(...children.filter((child) => child !== null && child !== undefined));
  return node;
}

/** A number for people: three significant digits, four from 1,000 on, a real minus sign. */
export function number(value) {
  if (value === 0) return "0";
  const size = Math.abs(value);
  const text = size >= 1e6 || size < 1e-6 ? value.toExponential(1) : String(+value.toPrecision(size >= 1000 ? 4 : 3));
  return text.replace("-", "−");
}

const signed = (value) => (value > 0 ? `+${number(value)}` : number(value));
const pValue = (p) => (p < 0.001 ? "p < 0.001" : `p ${+p.toPrecision(2)}`);

/** At most about `count` round numbers within a range. */
export function ticks(low, high, count) {
  const raw = (high - low) / count;
  const power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 5, 10].find((factor) => factor * power >= raw) * power;
  const found = [];
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high + 1e-9 * step; i++)
    found.push(+(i * step).toPrecision(12));
  return found;
}

/** A scale from values to pixels: a little wider than the values, and its ticks. */
function scale(values, from, to, count, log = false) {
  const finite = values.filter((value) => Number.isFinite(value) && (!log || value > 0));
  let [low, high] = finite.length ? [Math.min(...finite), Math.max(...finite)] : [0, 1];
  const project = log ? Math.log10 : (value) => value;
  const same = high - low <= 1e-9 * Math.max(Math.abs(low), Math.abs(high)); // means of equal numbers differ in rounding
  if (same) [low, high] = low === 0 ? [-1, 1] : [low - Math.abs(low) / 10, high + Math.abs(high) / 10];
  let [start, end] = [project(low), project(high)];
  const space = 0.06 * (end - start);
  [start, end] = [start - space, end + space];
  const place = (value) => from + ((project(value) - start) / (end - start)) * (to - from);
  const round = log ? logTicks(10 ** start, 10 ** end) : ticks(start, end, count);
  return Object.assign(place, { ticks: round });
}

/** The fullest of three sets of round numbers with at most six within a range. */
function logTicks(low, high) {
  for (const factors of [[1, 1.5, 2, 3, 5, 7], [1, 2, 5], [1]]) {
    const found = [];
    for (let power = Math.floor(Math.log10(low)); power <= Math.log10(high); power++) {
      found.push(...factors.map((factor) => +(factor * 10 ** power).toPrecision(6)));
    }
    const within = found.filter((value) => value >= low && value <= high);
    if (within.length <= 6) return within;
  }
  return [low, high];
}

async function copy(text, button) {
  const before = button.textContent;
  try {
    await navigator.clipboard.writeText(text);
  } catch {
    const area = make("textarea", { "aria-hidden": "true", class: "away" });
    area.value = text;
    document.body.append(area);
    area.select();
    document.execCommand("copy");
    area.remove();
    button.focus();
  }
  button.textContent = "copied";
  setTimeout(() => (button.textContent = before), 1500);
}

export function asCsv(rows) {
  const quoted = (cell) => (/[",\n]/.test(cell) ? `"${`${cell}`.replaceAll('"', '""')}"` : cell);
  return rows.map((row) => `${row.map(quoted).join(",")}\n`).join("");
}

// --- charts ----------------------------------------------------------------------------------------------------------

const text = (x, y, content, attributes = {}) => make("svg:text", { x, y, ...attributes }, content);
const line = (x1, y1, x2, y2, kind) => make("svg:line", { x1, y1, x2, y2, class: kind });

/** The mark of side A, a disc, or of side B, a diamond. */
function mark(side, x, y, size, title) {
  const [up, wide] = [size * 1.35, `${size * 1.35} ${size * 1.35}`];
  const diamond = `M${x} ${y - up}l${wide}l-${wide}l-${up} -${up}z`;
  const shape = side === "a" ? make("svg:circle", { cx: x, cy: y, r: size }) : make("svg:path", { d: diamond });
  shape.setAttribute("class", `mark ${side}`);
  if (title) shape.append(make("svg:title", {}, title));
  return shape;
}

/** A drawing with a name; without one, it is left to the words beside it. */
function picture(width, height, label, ...children) {
  const named = label ? { role: "img", "aria-label": label } : { "aria-hidden": "true" };
  return make("svg:svg", { viewBox: `0 0 ${width} ${height}`, ...named }, ...children);
}

/** Horizontal grid lines with their numbers, to the right of them `left`. */
function grid(y, left, right) {
  return y.ticks.flatMap((value) => [
    line(left, y(value), right, y(value), "grid"),
    text(left - 6, y(value) + 4, number(value), { class: "tick", "text-anchor": "end" }),
  ]);
}

/** Each pair as two marks with a line, the means, and the difference's interval beside them, from the mean of A. */
function flipChart(pairs, found, values) {
  const [width, height, xA, xB, xD] = [250, 200, 76, 146, 214];
  const y = scale(values, height - 26, 10, 5);
  const lines = pairs.map((pair) => line(xA, y(pair.a), xB, y(pair.b), "pair"));
  const marks = pairs.flatMap((pair) => [
    mark("a", xA, y(pair.a), 4, `seed ${pair.seed}: A ${number(pair.a)}`),
    mark("b", xB, y(pair.b), 4, `seed ${pair.seed}: B ${number(pair.b)}`),
  ]);
  const start = mean(pairs.map((pair) => pair.a));
  const title = make(
    "svg:title",
    {},
    `B − A: ${signed(found.mean)}, 95 %: ${signed(found.low)} to ${signed(found.high)}`,
  );
  const interval = make(
    "svg:g",
    { class: "interval" },
    line(xA, y(start), width - 8, y(start), "zero"),
    line(xD, y(start), xD, y(start + found.mean), "pair"),
    line(xD, y(start + found.low), xD, y(start + found.high), "bar"),
    make("svg:circle", { cx: xD, cy: y(start + found.mean), r: 4.5, class: "difference" }, title),
  );
  const names = [
    ["A", xA],
    ["B", xB],
    ["B − A", xD],
  ].map(([name, x]) => text(x, height - 6, name, { class: "name", "text-anchor": "middle" }));
  const means = line(xA, y(start), xB, y(start + found.mean), "mean");
  return picture(width, height, "", ...grid(y, 46, width - 8), ...lines, interval, means, ...marks, ...names);
}

/** Mean lines with the band from the lowest to the highest seed: series {side, x, mean, low, high}. */
function bandChart(series, labels, log) {
  const [width, height, left, right, bottom] = [420, 250, 52, 396, 212];
  const y = scale(
    series.flatMap((one) => [...one.low, ...one.high]),
    bottom,
    12,
    5,
    log,
  );
  const xs = series.flatMap((one) => one.x);
  const [first, last] = [Math.min(...xs), Math.max(...xs)];
  const x = (value) => left + ((value - first) / (last - first || 1)) * (right - left);
  const marks = series.flatMap((one) => {
    const points = (ys) => one.x.map((value, i) => [x(value), y(ys[i])].map((place) => place.toFixed(1)).join());
    const band = [...points(one.high), ...points(one.low).reverse()].join(" ");
    const end = [x(one.x.at(-1)), y(one.mean.at(-1))];
    return [
      make("svg:polygon", { points: band, class: `band ${one.side}` }),
      make("svg:polyline", { points: points(one.mean).join(" "), class: `curve ${one.side}` }),
      mark(one.side, end[0], end[1], 4, `${one.side.toUpperCase()} ends at ${number(one.mean.at(-1))}`),
    ];
  });
  const below = ticks(first, last, 6).map((value) =>
    text(x(value), bottom + 17, number(value), { class: "tick", "text-anchor": "middle" }),
  );
  const name = text((left + right) / 2, height - 4, labels.x, { class: "name", "text-anchor": "middle" });
  return picture(width, height, labels.whole, ...grid(y, left, right), ...marks, ...below, name);
}

/** A cost against a quality: points {x, y, side, name, best}; the frontier is a staircase. */
function costChart(points, labels, better) {
  const [width, height, left, right, bottom] = [420, 250, 52, 400, 210];
  const y = scale(
    points.map((point) => point.y),
    bottom,
    12,
    5,
  );
  const x = scale(
    points.map((point) => point.x),
    left,
    right,
    4,
  );
  const best = points.filter((point) => point.best).sort((one, two) => one.x - two.x);
  let stairs = "";
  best.forEach((point, i) => {
    stairs += i ? `H${x(point.x)}V${y(point.y)}` : `M${x(point.x)} ${y(point.y)}`;
  });
  const marks = points.map((point) => {
    const words = `${point.name}: ${number(point.x)}, ${number(point.y)}`;
    if (point.side) return mark(point.side, x(point.x), y(point.y), 6, words);
    const disc = make("svg:circle", { cx: x(point.x), cy: y(point.y), r: 4, class: point.best ? "best" : "other" });
    disc.append(make("svg:title", {}, words));
    return disc;
  });
  const layer = (node) => ["other", "best", "mark a", "mark b"].indexOf(node.getAttribute("class"));
  marks.sort((one, two) => layer(one) - layer(two));
  const below = x.ticks.map((value) =>
    text(x(value), bottom + 17, number(value), { class: "tick", "text-anchor": "middle" }),
  );
  const name = text((left + right) / 2, height - 6, labels.x, { class: "name", "text-anchor": "middle" });
  const staircase = better ? make("svg:path", { d: stairs, class: "frontier" }) : null;
  return picture(width, height, labels.whole, ...grid(y, left, right), staircase, ...below, name, ...marks);
}

// --- sample sheets ---------------------------------------------------------------------------------------------------

const TILE = 64; // pixels along a side of a sample as it is shown, or the nearest multiple of its own
const GAP = 3;

/** Draw a stored sheet, 4 × 4 samples with one pixel between them, enlarged by whole pixels. */
async function drawSheet(canvas, source) {
  const image = new Image();
  image.src = source;
  await image.decode();
  const side = (image.width - 1) / 4 - 1;
  const shown = side * Math.max(1, Math.round(TILE / side));
  canvas.width = canvas.height = 4 * shown + 3 * GAP;
  const context = canvas.getContext("2d");
  context.imageSmoothingEnabled = false;
  for (let tile = 0; tile < 16; tile++) {
    const [row, column] = [Math.floor(tile / 4), tile % 4];
    const from = [1 + column * (side + 1), 1 + row * (side + 1)];
    context.drawImage(image, ...from, side, side, column * (shown + GAP), row * (shown + GAP), shown, shown);
  }
}

function sheet(source, label) {
  const canvas = make("canvas", { role: "img", "aria-label": label, width: 265, height: 265 });
  drawSheet(canvas, source).catch(() => canvas.replaceWith(make("p", { class: "note" }, `${label}: not readable`)));
  return canvas;
}

/** Both sheets on top of each other, with a slider that shows A to its left and B to its right. */
function wipe(sources, labels, share, remember) {
  const [below, above] = sources.map((source, i) => sheet(source, labels[i]));
  const edge = make("div", { class: "edge" });
  const slider = make("input", {
    type: "range",
    min: 0,
    max: 100,
    value: share,
    "data-key": "wipe",
    "aria-label": "how much of A is shown, from the left",
    oninput: () => move(slider.value),
  });
  const stack = make("div", { class: "stack" }, below, above, edge);
  function move(value) {
    stack.style.setProperty("--share", `${value}%`);
    slider.setAttribute("aria-valuetext", `${value} % A`);
    remember(+value);
  }
  move(share);
  return make("figure", {}, stack, slider, make("figcaption", {}, "move the slider: A on the left, B on the right"));
}

// --- the page --------------------------------------------------------------------------------------------------------

const GUESSES = "pixnerd-ablations-guesses"; // where the browser keeps the score
const COSTS = ["seconds_per_step", "activations_mib", "parameters"];
const CURVES = {
  loss: "training loss",
  gradient_norm: "gradient norm",
  error_by_t: "velocity error by tenth of t",
};

/** The score so far, {asked, right}; a browser that keeps nothing starts anew. */
function keptScore() {
  try {
    return { asked: 0, right: 0, ...JSON.parse(localStorage.getItem(GUESSES)) };
  } catch {
    return { asked: 0, right: 0 };
  }
}

function keepScore(score) {
  try {
    localStorage.setItem(GUESSES, JSON.stringify(score));
  } catch {
    // a page that may keep nothing
  }
}

class Explorer {
  /**
   * @param el where the page is drawn
   * @param index what index.py made
   * @param options inAddress: the page's address holds the selection; train(study, index) and stop(), with a kernel
   */
  constructor(el, index, options) {
    Object.assign(this, { el, index, options, guessed: new Map(), score: keptScore(), guessing: false });
    Object.assign(this, { share: 50, sorts: {}, opened: false, listing: false, progress: {} });
    el.classList.add("ablations");
    this.wanted = options.inAddress ? fromAddress(location.hash) : { at: {} };
    this.controls = make("div", { class: "controls" });
    this.selects = new Map();
    this.parts = {};
    for (const name of ["flip", ...Object.keys(SECTIONS)]) this.parts[name] = make("section", { class: name });
    this.said = make("p", { class: "away", "aria-live": "polite" });
    this.question = make("p", { class: "question" });
    el.replaceChildren(this.question, this.controls, this.said, ...Object.values(this.parts));
    if (options.inAddress) {
      window.addEventListener("hashchange", () => {
        if (location.hash === this.address || !location.hash.includes("=")) return;
        this.wanted = fromAddress(location.hash);
        this.draw();
      });
    }
    this.draw();
  }

  /** Show another index, as after a run has ended. */
  update(index) {
    this.index = index;
    this.draw();
  }

  /** Say how far a run is that is being trained; the rest of the page stays as it is, for it may be in use. */
  report(progress) {
    const before = this.progress;
    const shown = this.parts.missing.querySelector(".progress");
    this.progress = progress;
    if (shown && before.running && progress.running) {
      shown.textContent = progressLine(progress);
      return;
    }
    this.draw();
    if (progress.running) this.said.textContent = progressLine(progress);
    else if (before.running) this.said.textContent = "the training run has ended";
  }

  choose(changes) {
    this.wanted = { ...this.selection, ...changes };
    for (const name of ["columns", "rows"]) this.wanted[name] ||= "none";
    this.draw();
  }

  // --- what is selected ---

  get study() {
    return this.index.studies.find((study) => study.name === this.selection.study);
  }

  get measure() {
    return this.index.measures[this.selection.measure] ?? { title: "nothing measured yet", better: "" };
  }

  key(fixed) {
    const { study, measure, axis, a, b } = this.selection;
    return JSON.stringify([study, measure, axis, a, b, Object.entries(fixed).sort()]);
  }

  /** Whether a panel waits for a guess. */
  isHidden(fixed) {
    return this.guessing && !this.guessed.has(this.key(fixed)) && pairsOf(this.study, this.selection, fixed).length > 0;
  }

  /** The values of an axis that name a panel: "prediction v, ratio 6". */
  named(fixed) {
    const several = Object.entries(fixed).filter(([axis]) => this.study.axes[axis].length > 1);
    return several.map(([axis, value]) => `${axis} ${value}`).join(", ");
  }

  /** Those of A and B that the study has; of one arm there is A alone. */
  sides() {
    return ["a", "b"].filter((side) => this.selection[side] !== undefined);
  }

  sideName(side) {
    return `${this.selection.axis} ${this.selection[side]}`;
  }

  runsOn(side) {
    const { axis, at } = this.selection;
    return [...runsOf(this.study, { ...at, [axis]: this.selection[side] }).values()];
  }

  // --- drawing ---

  draw() {
    const root = this.el.getRootNode();
    const focus = root.activeElement?.dataset?.key;
    if (!this.index.studies.length) {
      this.controls.replaceChildren(make("p", {}, "No study has runs or a record yet."));
      this.parts.left.replaceChildren(...leftOut(this));
      return;
    }
    this.selection = completed(this.index, this.wanted);
    this.wanted = this.selection;
    this.address = toAddress(this.selection);
    if (this.options.inAddress && location.hash !== this.address) history.replaceState(null, "", this.address);
    this.question.textContent = this.study.question;
    this.drawControls();
    this.drawFlip();
    const shown = this.selection.axis && !this.isHidden(this.selection.at);
    for (const [name, section] of Object.entries(SECTIONS)) {
      this.parts[name].replaceChildren(...(shown || !section.tells ? section.draw(this) : []));
    }
    if (focus) this.focusOn(focus);
  }

  /** Focus the control of a key; if it is gone, as a button that started or stopped a run, what stands for it now. */
  focusOn(key) {
    const find = (selector) => this.el.querySelector(selector);
    (find(`[data-key="${CSS.escape(key)}"]`) ?? find('[data-key="stop"]') ?? find("summary"))?.focus();
  }

  /** A labelled choice that stays in place while its options change. */
  select(name, label, options, value, choose) {
    if (!this.selects.has(name)) {
      const node = make("select", { "data-key": `select ${name}` });
      this.selects.set(name, { node, label: make("label", {}, make("span", {}, label), node) });
      node.addEventListener("change", () => this.selects.get(name).choose(node.value));
    }
    const entry = this.selects.get(name);
    entry.choose = choose;
    entry.label.firstChild.textContent = label;
    const groups = grouped(options, (option) => option.group ?? "");
    const nodes = [...groups].flatMap(([group, members]) => {
      const made = members.map((option) => make("option", { value: option.value }, option.label ?? option.value));
      return group ? [make("optgroup", { label: group }, ...made)] : made;
    });
    entry.node.replaceChildren(...nodes);
    entry.node.value = value;
    return entry.label;
  }

  drawControls() {
    const { study, selection, index } = this;
    const plain = (values) => values.map((value) => ({ value }));
    const named = index.studies.map((entry) => ({ value: entry.name }));
    const measures = Object.entries(index.measures)
      .filter(([name]) => study.runs.some((run) => name in run.measures))
      .map(([name, measure]) => ({ value: name, label: measure.title, group: measure.group }));
    const nodes = [
      this.select("study", "study", named, selection.study, (name) => this.choose({ study: name })),
      this.select("measure", "measure", measures, selection.measure, (measure) => this.choose({ measure })),
    ];
    if (this.sides().length > 1) nodes.push(...this.switchControls(plain));
    const toggle = make("input", { type: "checkbox", "data-key": "guess", onchange: () => this.toggleGuessing() });
    toggle.checked = this.guessing;
    const score = this.score.asked ? ` (${this.score.right} of ${this.score.asked} right)` : "";
    nodes.push(make("label", { class: "toggle" }, toggle, make("span", {}, `predict first${score}`)));
    this.controls.replaceChildren(...nodes);
  }

  switchControls(plain) {
    const { study, selection } = this;
    const { axis, a, b } = selection;
    const flipped = Object.keys(study.axes).filter((name) => study.axes[name].length > 1);
    const nodes = [
      this.select("switch", "switch", plain(flipped), axis, (name) => this.choose({ axis: name, at: this.whole() })),
      this.select("a", "A", plain(study.axes[axis]), a, (value) => this.side("a", value)),
      make(
        "button",
        {
          type: "button",
          class: "swap",
          "data-key": "swap",
          onclick: () => this.choose({ a: b, b: a }),
          "aria-label": "swap A and B",
          title: "swap A and B",
        },
        "⇄",
      ),
      this.select("b", "B", plain(study.axes[axis]), b, (value) => this.side("b", value)),
    ];
    nodes[1].classList.add("side-a");
    nodes[3].classList.add("side-b");
    if (study.loose) return nodes;
    const others = Object.keys(study.axes).filter((name) => name !== axis);
    const free = (taken) => plain(["none", ...others.filter((name) => name !== taken)]);
    if (others.length > 0) {
      const change = (columns) => this.choose({ columns });
      nodes.push(
        this.select("columns", "side by side", plain(["none", ...others]), selection.columns || "none", change),
      );
    }
    if (others.length > 1) {
      const options = free(selection.columns);
      nodes.push(this.select("rows", "row by row", options, selection.rows || "none", (rows) => this.choose({ rows })));
    }
    for (const name of others.filter((other) => ![selection.columns, selection.rows].includes(other))) {
      const hold = (value) => this.choose({ at: { ...selection.at, [name]: value } });
      nodes.push(this.select(`at ${name}`, name, plain(study.axes[name]), selection.at[name], hold));
    }
    return nodes;
  }

  /** The values of all axes in focus, the switch's included, for when another one becomes the switch. */
  whole() {
    return { ...this.selection.at, [this.selection.axis]: this.selection.b };
  }

  side(name, value) {
    const other = name === "a" ? "b" : "a";
    const swapped = this.selection[other] === value ? { [other]: this.selection[name] } : {};
    this.choose({ [name]: value, ...swapped });
  }

  toggleGuessing() {
    this.guessing = !this.guessing;
    this.draw();
  }

  // --- the flip ---

  drawFlip() {
    const { study, selection } = this;
    if (this.sides().length < 2) {
      this.parts.flip.replaceChildren(make("p", {}, "There is one arm, and nothing to compare it with."));
      return;
    }
    const panels = panelsOf(study, selection);
    const rows = grouped(panels, (panel) => panel.row);
    const [nodes, groups] = [[this.legend()], []];
    if (this.isHidden(selection.at)) nodes.push(this.guess());
    for (const [row, members] of rows) {
      const pairs = members.map((panel) => pairsOf(study, selection, panel.fixed));
      const founds = pairs.map(compare);
      const values = members.flatMap((panel, i) =>
        this.isHidden(panel.fixed) ? [] : [...pairs[i].flatMap(({ a, b }) => [a, b]), ...ends(pairs[i], founds[i])],
      );
      const made = members.map((panel, i) => this.panel(panel, pairs[i], founds[i], values));
      const heading = row ? make("h3", {}, `${selection.rows} ${row}`) : null;
      groups.push(make("div", { class: "group" }, heading, make("div", { class: "panels" }, ...made)));
    }
    nodes.push(make("div", { class: "groups" }, ...groups));
    if (!panels.length) nodes.push(make("p", {}, "No two runs differ in this switch alone."));
    nodes.push(make("p", { class: "note" }, READING));
    this.parts.flip.replaceChildren(...nodes);
    const found = compare(pairsOf(study, selection, selection.at));
    const hidden = this.isHidden(selection.at);
    this.said.textContent = found && !hidden ? this.sentence(selection.at, found) : "";
  }

  legend() {
    const item = (side) =>
      make(
        "span",
        { class: `side ${side}` },
        make("svg:svg", { viewBox: "0 0 16 16", "aria-hidden": "true" }, mark(side, 8, 8, 5)),
        ` ${side.toUpperCase()}: ${this.sideName(side)}`,
      );
    const better = this.measure.better ? `${this.measure.better} is better` : "neither way is better";
    const title = make("span", { class: "measured" }, `${this.measure.title} (${better})`);
    return make("h2", { class: "legend" }, title, item("a"), item("b"));
  }

  panel({ fixed, row, column }, pairs, found, values) {
    const { study, selection } = this;
    const title = study.loose ? this.named(fixed) : column && `${selection.columns} ${column}`;
    const content = [make("span", { class: "heading" }, title || "all pairs")];
    if (row) content.push(make("span", { class: "away" }, `, ${selection.rows} ${row}: `));
    if (!found) content.push(make("span", { class: "empty" }, "no pair of runs"));
    else if (this.isHidden(fixed)) content.push(make("span", { class: "empty" }, "predict first"));
    else {
      const words = verdict(found, this.measure);
      const interval = ` (${signed(found.low)} … ${signed(found.high)})`;
      content.push(
        flipChart(pairs, found, values),
        make("span", { class: `verdict ${words.split(" ")[0]}` }, spoken(words)),
        make("span", { class: "figures" }, `${signed(found.mean)}${found.pairs > 1 ? interval : ""}`),
        make("span", { class: "figures" }, `${pValue(found.p)}, ${plural(found.pairs, "pair")}`),
      );
    }
    const attributes = {
      type: "button",
      class: "panel",
      "data-key": `panel ${JSON.stringify(fixed)}`,
      "aria-pressed": `${this.key(fixed) === this.key(selection.at)}`,
      onclick: () => this.choose({ at: fixed }),
    };
    return make("button", attributes, ...content);
  }

  /** A comparison in words. */
  sentence(fixed, found) {
    const said = spoken(verdict(found, this.measure));
    const where = this.named(fixed);
    const numbers = `difference ${signed(found.mean)}, 95 % interval ${signed(found.low)} to ${signed(found.high)}`;
    return `${where}${where && ": "}${said}, ${numbers}, ${pValue(found.p)}, ${plural(found.pairs, "pair")}`;
  }

  // --- predict first ---

  guess() {
    const { better } = this.measure;
    const [one, two] = better ? ["A is better", "B is better"] : ["A is higher", "B is higher"];
    const answer = (side) => () => this.answer(side);
    const where = this.named(this.selection.at);
    return make(
      "fieldset",
      { class: "guess" },
      make("legend", {}, `What do you expect${where && ` at ${where}`}?`),
      make("button", { type: "button", "data-key": "guess a", onclick: answer("a") }, one),
      make("button", { type: "button", "data-key": "guess b", onclick: answer("b") }, two),
      make("button", { type: "button", "data-key": "guess none", onclick: answer("") }, "no clear difference"),
    );
  }

  answer(side) {
    const { at } = this.selection;
    const words = verdict(compare(pairsOf(this.study, this.selection, at)), this.measure);
    const truth = { better: "b", higher: "b", worse: "a", lower: "a" }[words] ?? "";
    this.guessed.set(this.key(at), side === truth);
    this.score = { asked: this.score.asked + 1, right: this.score.right + (side === truth) };
    keepScore(this.score);
    this.draw();
    this.el.querySelector(".panel[aria-pressed=true]")?.focus();
    this.said.textContent = `${side === truth ? "right" : "not so"}: ${this.said.textContent}`;
    const told = make("p", { class: "told" }, side === truth ? "As you predicted." : "Not as you predicted.");
    this.parts.flip.querySelector(".legend").after(told);
  }
}

const READING =
  "Each line is a pair of runs with the same seed. B − A: the mean difference and its 95 % interval (bootstrap over " +
  "the pairs), drawn from the mean of A; p by sign flips. A difference counts as decided if p is at most 0.05 and the " +
  "interval leaves out 0. The panel that you press is the one shown below.";

/** A verdict as a sentence. */
const spoken = (words) => (/^(undecided|no) /.test(words) ? words : `B is ${words}`);

const plural = (count, noun) => `${count} ${noun}${count === 1 ? "" : "s"}`;

/** Where the interval of a comparison ends in its panel. */
function ends(pairs, found) {
  if (!found) return [];
  const start = mean(pairs.map((pair) => pair.a));
  return [start + found.low, start + found.high];
}

// --- the sections below the flip: each gives its nodes for a page ---------------------------------------------------

/** Curves of both sides: the mean of the seeds, and the band from the lowest to the highest. */
function curves(page) {
  const nodes = [];
  for (const [name, title] of Object.entries(CURVES)) {
    const series = ["a", "b"].map((side) => seriesOf(page.runsOn(side), name, side)).filter(Boolean);
    if (!series.length) continue;
    const highest = Math.max(...series.flatMap((one) => one.high));
    const log =
      highest > 5 * Math.min(...series.flatMap((one) => one.low)) && series.every((one) => one.low.every((v) => v > 0));
    const labels = {
      x: name === "error_by_t" ? "t, from noise (0) to data (1)" : "step",
      whole: `${title} of A and B`,
    };
    nodes.push(
      make("figure", {}, make("figcaption", {}, `${title}${log ? ", log scale" : ""}`), bandChart(series, labels, log)),
    );
  }
  const note = "Line: mean of the seeds. Band: from the lowest to the highest seed.";
  return nodes.length
    ? [
        make("h3", {}, headed(page, "Curves")),
        make("div", { class: "charts" }, ...nodes),
        make("p", { class: "note" }, note),
      ]
    : [];
}

const headed = (page, title) => {
  const where = page.named(page.selection.at);
  return where ? `${title} at ${where}` : title;
};

/** One curve of several runs: mean, lowest and highest at the places that all have. */
function seriesOf(runs, name, side) {
  const having = runs.filter((run) => run.curves[name]?.some((value) => value !== null));
  if (!having.length) return null;
  const places = (run) => (name === "error_by_t" ? run.curves[name].map((_, i) => (i + 0.5) / 10) : run.curves.step);
  const values = grouped(
    having.flatMap((run) => places(run).map((x, i) => ({ x, y: run.curves[name][i] }))).filter(({ y }) => y !== null),
    ({ x }) => x,
  );
  const kept = [...values].filter(([, points]) => points.length === having.length).sort(([one], [two]) => one - two);
  if (!kept.length) return null;
  const each = (take) => kept.map(([, points]) => take(points.map(({ y }) => y)));
  const [low, high] = [each((ys) => Math.min(...ys)), each((ys) => Math.max(...ys))];
  return { side, x: kept.map(([x]) => x), mean: each(mean), low, high };
}

/** The sample sheets of both sides beside each other, and one over the other. */
function samples(page) {
  const { study, selection } = page;
  const arms = page.sides().map((side) => armOf(study, { ...selection.at, [selection.axis]: selection[side] }));
  const sources = arms.map((arm) => study.sheets[arm]);
  if (!sources.some(Boolean)) return [];
  const many = study.loose ? "samples" : "sixteen samples";
  const labels = page.sides().map((side) => `${many} of ${side.toUpperCase()}, ${page.sideName(side)}`);
  const figures = page.sides().map((side, i) => {
    const caption = make("figcaption", { class: `side ${side}` }, `${side.toUpperCase()}: ${page.sideName(side)}`);
    return make(
      "figure",
      {},
      sources[i] ? sheet(sources[i], labels[i]) : make("p", { class: "blank" }, "no samples kept"),
      caption,
    );
  });
  const remember = (share) => (page.share = share);
  if (sources.length > 1 && sources.every(Boolean)) figures.push(wipe(sources, labels, page.share, remember));
  const note = study.loose
    ? "The newest samples that a run on each side keeps; they may be asked for other things, and start from other noise."
    : "Both start from the same noise in the same place. They are the samples of one seed.";
  return [
    make("h3", {}, headed(page, "Samples")),
    make("div", { class: "sheets" }, ...figures),
    make("p", { class: "note" }, note),
  ];
}

/** What each arm costs against what it gives, over the arms of the focused row. */
function cost(page) {
  const { study, selection, index } = page;
  const costly = page.measure.group === "cost";
  const having = (name) => study.runs.some((run) => name in run.measures);
  const y = costly
    ? Object.keys(index.measures).find((name) => index.measures[name].group !== "cost" && having(name))
    : selection.measure;
  if (!y) return [];
  const fixed = { ...selection.at };
  delete fixed[selection.columns];
  const panel = (run) =>
    Object.fromEntries(Object.entries(choicesOf(study, run)).filter(([axis]) => axis !== selection.axis));
  const runs = study.runs.filter((run) => agrees(choicesOf(study, run), fixed) && !page.isHidden(panel(run)));
  const arms = [...grouped(runs, (run) => run.choices.join("-")).values()];
  const { better, title } = index.measures[y];
  const charts = COSTS.filter(having).map((x) => {
    const points = arms.flatMap((members) => pointsOf(page, members, x, y));
    const best = better ? frontier(points, better) : [];
    for (const point of best) point.best = true;
    const labels = { x: index.measures[x].title, whole: `${title} against ${index.measures[x].title}` };
    const names = best.map((point) => point.name).join("; ");
    return make(
      "figure",
      {},
      make("figcaption", {}, `${title} against ${labels.x}`),
      costChart(points, labels, better),
      better ? make("p", { class: "note" }, make("b", {}, "On the frontier: "), names) : null,
    );
  });
  if (!charts.length) return [];
  const where = page.named(fixed);
  const way = better ? `; towards the left and ${better === "lower" ? "the bottom" : "the top"} is better` : "";
  const stairs = "The stairs join the arms that no other beats in both.";
  const note = `Every arm${where && ` at ${where}`}, the mean of its seeds${way}. ${stairs}`;
  return [
    make("h3", {}, "What it costs"),
    make("div", { class: "charts" }, ...charts),
    make("p", { class: "note" }, note),
  ];
}

/** An arm as a point: the means of two measures; none if no run has both. */
function pointsOf(page, runs, x, y) {
  const { study, selection } = page;
  const having = runs.filter((run) => x in run.measures && y in run.measures);
  if (!having.length) return [];
  const choices = choicesOf(study, having[0]);
  const side = agrees(choices, selection.at) && ["a", "b"].find((name) => selection[name] === choices[selection.axis]);
  const varied = Object.keys(study.axes).filter((axis) => [selection.axis, selection.columns].includes(axis));
  const [meanX, meanY] = [x, y].map((name) => mean(having.map((run) => run.measures[name])));
  return [{ x: meanX, y: meanY, side, name: varied.map((axis) => choices[axis]).join(" ") }];
}

/** The pairs behind the picture, and every measure of the panel in focus. */
function tables(page) {
  const { study, selection, index } = page;
  const rows = panelsOf(study, selection)
    .filter((panel) => !page.isHidden(panel.fixed))
    .flatMap((panel) =>
      pairsOf(study, selection, panel.fixed).map(({ seed, a, b }) => {
        const named = Object.keys(study.axes)
          .filter((axis) => axis in panel.fixed)
          .map((axis) => panel.fixed[axis]);
        return [...named, seed, a, b, b - a];
      }),
    );
  const axes = Object.keys(study.axes).filter((axis) => axis !== selection.axis);
  const pairs = {
    name: "pairs",
    titles: [...axes, study.repeat, `A ${selection.a}`, `B ${selection.b}`, "B − A"],
    rows,
  };
  const all = Object.entries(index.measures).flatMap(([name, measure]) => {
    const found = compare(pairsOf(study, selection, selection.at, name));
    const figures = found && [found.mean, found.low, found.high, found.p, found.pairs, verdict(found, measure)];
    return found ? [[measure.title, ...figures]] : [];
  });
  const titles = ["measure", "B − A", "95 % from", "to", "p", "pairs", "B is"];
  return [
    make("h3", {}, headed(page, "Every measure")),
    ...tableOf(page, { name: "measures", titles, rows: all }),
    make("p", { class: "note" }, "Many comparisons: about one in twenty has a p below 0.05 by chance alone."),
    make(
      "details",
      {
        "data-open": "pairs",
        ...(page.opened && { open: true }),
        ontoggle: (event) => (page.opened = event.target.open),
      },
      make(
        "summary",
        { "data-key": "pairs" },
        `The ${plural(rows.length, "pair")} behind the picture: ${page.measure.title}`,
      ),
      ...tableOf(page, pairs),
    ),
  ];
}

/** A table that is sorted by the column whose title is pressed, and copied as CSV. */
function tableOf(page, { name, titles, rows }) {
  const sort = (page.sorts[name] ??= { column: null, down: false });
  const sorted =
    sort.column === null ? rows : [...rows].sort((one, two) => ordered(one[sort.column], two[sort.column]));
  if (sort.down) sorted.reverse();
  const press = (column) => () => {
    page.sorts[name] = { column, down: sort.column === column && !sort.down };
    page.draw();
  };
  const heads = titles.map((title, column) => {
    const state = sort.column !== column ? "none" : sort.down ? "descending" : "ascending";
    const button = make(
      "button",
      { type: "button", "data-key": `sort ${name} ${column}`, onclick: press(column) },
      title,
    );
    return make("th", { scope: "col", "aria-sort": state }, button);
  });
  const cell = (value, column) =>
    make(
      "td",
      typeof value === "number" ? { class: "number" } : {},
      typeof value !== "number" ? value : shownAs(titles[column], value),
    );
  const body = sorted.map((row) => make("tr", {}, ...row.map(cell)));
  const button = make(
    "button",
    { type: "button", "data-key": `copy ${name}`, onclick: () => copy(asCsv([titles, ...sorted]), button) },
    "copy as CSV",
  );
  const table = make("table", {}, make("thead", {}, make("tr", {}, ...heads)), make("tbody", {}, ...body));
  return [
    make("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": `table of ${name}` }, table),
    button,
  ];
}

const shownAs = (title, value) => (title === "p" ? String(+value.toPrecision(2)) : number(value));
const ordered = (one, two) =>
  typeof one === "number" && typeof two === "number"
    ? one - two
    : `${one}`.localeCompare(`${two}`, "en", { numeric: true });

/** What the switch sets, the command that makes both sides again, and the link to this view. */
function again(page) {
  const { study, selection } = page;
  if (!selection.axis) return [];
  const [a, b] = ["a", "b"].map(
    (side) => study.settings[armOf(study, { ...selection.at, [selection.axis]: selection[side] })] ?? {},
  );
  const differing = Object.keys(a).filter((name) => JSON.stringify(a[name]) !== JSON.stringify(b[name]));
  const value = (entry) =>
    entry === undefined || entry === null ? "none" : typeof entry === "string" ? entry : JSON.stringify(entry);
  const set = differing.map((name) => make("li", {}, make("code", {}, name), ` ${value(a[name])} → ${value(b[name])}`));
  const command = commandOf(study, selection, selection.at);
  const copied = make(
    "button",
    { type: "button", "data-key": "copy command", onclick: () => copy(command, copied) },
    "copy the command",
  );
  const link = make(
    "button",
    { type: "button", "data-key": "copy link", onclick: () => copy(location.href, link) },
    "copy a link to this view",
  );
  const known = set.length ? make("ul", {}, ...set) : make("p", {}, "The settings of these arms are not known.");
  const both = page.sides().length > 1;
  return [
    both && make("h3", {}, "What the switch sets"),
    both && known,
    make("h3", {}, headed(page, both ? "Make both sides again" : "Make it again")),
    make("pre", { tabindex: 0, "aria-label": "command" }, command),
    copied,
    page.options.inAddress ? link : null,
  ].filter(Boolean);
}

const progressLine = ({ index, study, line: words }) => `run ${index} of ${study}: ${words}`;

const SHOWN = 40; // missing runs that are listed

/** The runs of both sides that nobody has made; with a kernel each can be trained. */
function missing(page) {
  const { study, selection, progress, options } = page;
  const wanted = study.missing.filter((run) =>
    [selection.a, selection.b].includes(choicesOf(study, run)[selection.axis]),
  );
  const nodes = [];
  if (progress.running) {
    nodes.push(
      make("p", { class: "progress" }, progressLine(progress)),
      make(
        "button",
        { type: "button", "data-key": "stop", onclick: () => options.stop() },
        "stop (what is trained is kept)",
      ),
    );
  }
  if (progress.error) nodes.push(make("p", { class: "error", role: "alert" }, progress.error));
  if (!wanted.length) return nodes;
  const items = wanted.slice(0, SHOWN).map((run) => {
    const name = `${run.index}: ${run.choices.join(", ")}, ${study.repeat} ${run.repeat}`;
    const state = run.state === "missing" ? "" : ` (${run.state}${run.why && `: ${run.why}`})`;
    const train = () => options.train(study.name, run.index);
    const button =
      options.train && study.file && !progress.running
        ? make(
            "button",
            { type: "button", "data-key": `train ${run.index}`, onclick: train },
            "train this one now",
            make("span", { class: "away" }, ` run ${name}`),
          )
        : null;
    return make("li", {}, `${name}${state} `, button ?? "");
  });
  const more = wanted.length > SHOWN ? [make("li", {}, `and ${wanted.length - SHOWN} more`)] : [];
  const list = make("ul", {}, ...items, ...more);
  const summary = make(
    "summary",
    { "data-key": "missing" },
    `${plural(wanted.length, "run")} of these two values not made yet`,
  );
  const attributes = {
    ontoggle: (event) => (page.listing = event.target.open),
    ...((page.listing || progress.running) && { open: true }),
  };
  return [...nodes, make("details", attributes, summary, list)];
}

/** What could not be read, and why. */
function leftOut(page) {
  const entries = page.index.left_out;
  if (!entries.length) return [];
  const items = entries.map(({ where, why }) => make("li", {}, make("code", {}, where), ` ${why}`));
  return [
    make("details", {}, make("summary", {}, `${plural(entries.length, "folder")} left out`), make("ul", {}, ...items)),
  ];
}

// `tells`: it would give away what is to be predicted
const SECTIONS = {
  curves: { draw: curves, tells: true },
  samples: { draw: samples, tells: true },
  cost: { draw: cost, tells: true },
  table: { draw: tables, tells: true },
  again: { draw: again, tells: false },
  missing: { draw: missing, tells: false },
  left: { draw: leftOut, tells: false },
};

// --- with a kernel, and without --------------------------------------------------------------------------------------

/** For anywidget: the model has index, progress and in_address; messages ask the kernel to train. */
function render({ model, el }) {
  const page = new Explorer(el, model.get("found"), {
    inAddress: model.get("in_address"),
    train: (study, index) => model.send({ do: "train", study, index }),
    stop: () => model.send({ do: "stop" }),
  });
  const renew = () => page.update(model.get("found"));
  const report = () => page.report(model.get("progress"));
  model.on("change:found", renew);
  model.on("change:progress", report);
  report();
  return () => {
    model.off("change:found", renew);
    model.off("change:progress", report);
  };
}

/** For a page without a kernel: where to draw, and the script element that holds the index as JSON. */
export function showIndex(el, script) {
  return new Explorer(el, JSON.parse(script.textContent), { inAddress: true });
}

export default { render };
