// One curve over the steps, drawn by uPlot, with its numbers as text beside it.
import uPlot from "../libraries/uplot.js";
import { Component, html } from "./html.js";
import { amount, named } from "./words.js";

const HEIGHT = 170;
const NARROW = 120;
// Distances between two marks of the steps: there is no step 1.5.
const WHOLE = Array.from({ length: 24 }, (_, n) => [1, 2, 5][n % 3] * 10 ** Math.floor(n / 3));

export class Chart extends Component {
  constructor(props) {
    super(props);
    this.state = { at: null };
    this.scheme = matchMedia("(prefers-color-scheme: dark)");
    this.redraw = () => this.draw();
    this.place = (element) => {
      this.element = element;
    };
  }

  componentDidMount() {
    this.draw();
    this.sizes = new ResizeObserver(() => {
      const width = this.element ? this.element.clientWidth : 0;
      if (this.plot && width > NARROW && width !== this.plot.width) this.plot.setSize({ width, height: HEIGHT });
    });
    this.sizes.observe(this.element);
    this.scheme.addEventListener("change", this.redraw);
  }

  componentDidUpdate(before) {
    if (before.smooth !== this.props.smooth) this.draw();
    else if (before.steps !== this.props.steps || before.values !== this.props.values) this.plot.setData(this.data());
  }

  componentWillUnmount() {
    this.sizes.disconnect();
    this.scheme.removeEventListener("change", this.redraw);
    this.plot.destroy();
  }

  data() {
    const { steps, values, smooth } = this.props;
    return smooth ? [steps, values, smoothed(values)] : [steps, values];
  }

  draw() {
    if (this.plot) this.plot.destroy();
    const style = getComputedStyle(this.element);
    const [ink, grid, line, faint] = ["--quiet", "--line", "--accent", "--accent-faint"].map((name) => style.getPropertyValue(name).trim());
    const axis = { stroke: ink, grid: { stroke: grid, width: 1 }, ticks: { stroke: grid, width: 1, size: 4 }, font: "11px system-ui" };
    const series = [{}, { stroke: this.props.smooth ? faint : line, width: 2, spanGaps: true, points: { show: this.props.steps.length < 2 } }];
    if (this.props.smooth) series.push({ stroke: line, width: 2, spanGaps: true, points: { show: false } });
    this.plot = new uPlot(
      {
        width: Math.max(NARROW, this.element.clientWidth),
        height: HEIGHT,
        legend: { show: false },
        cursor: { sync: { key: "steps" }, y: false, drag: { x: true, y: false } },
        scales: { x: { time: false } },
        axes: [{ ...axis, size: 28, incrs: WHOLE }, { ...axis, size: 56, values: (_, ticks) => ticks.map(amount) }],
        series,
        hooks: { setCursor: [(plot) => this.setState({ at: plot.cursor.idx ?? null })] },
      },
      this.data(),
      this.element,
    );
  }

  render({ name, steps, values }, { at }) {
    const known = values.map((value, index) => [value, steps[index]]).filter(([value]) => value !== null);
    const [first] = known;
    const last = known[known.length - 1];
    const here = at !== null && at < values.length ? `${amount(values[at])} at step ${amount(steps[at])}` : "";
    const numbers = known.map(([value]) => value);
    const words = known.length
      ? `${named(name)}: ${amount(first[0])} at step ${amount(first[1])}, ${amount(last[0])} at step ${amount(last[1])}, lowest ${amount(Math.min(...numbers))}, highest ${amount(Math.max(...numbers))}`
      : `${named(name)}: nothing yet`;
    return html`<figure class="chart" data-metric=${name}>
      <figcaption>
        <span class="chart-name">${named(name)}</span>
        <span class="number">${here || (known.length ? `${amount(first[0])} → ${amount(last[0])}` : "–")}</span>
      </figcaption>
      <div class="plot" ref=${this.place} role="img" aria-label=${words}></div>
    </figure>`;
  }
}

// An exponential mean whose beginning is not drawn towards zero; what is missing stays missing.
function smoothed(values, weight = 0.9) {
  let sum = 0;
  let known = 0;
  return values.map((value) => {
    if (value === null) return null;
    known += 1;
    sum = weight * sum + (1 - weight) * value;
    return sum / (1 - weight ** known);
  });
}
