// One job or run.
import { Poll } from "./api.js";
import { Chart } from "./chart.js";
import { Component, html } from "./html.js";
import { Banner, Bar, Gone, Phase, TITLES } from "./parts.js";
import { amount, between, clock, named } from "./words.js";

const FIRST_CURVES = 6;

export class Job extends Component {
  constructor(props) {
    super(props);
    this.state = { data: null, problem: null, gone: false, smooth: false, all: false };
  }

  componentDidMount() {
    this.poll = new Poll(`api/job?key=${encodeURIComponent(this.props.id)}`, (news) => this.take(news));
  }

  componentWillUnmount() {
    this.poll.stop();
  }

  take(news) {
    if (news.gone) this.setState({ gone: true });
    else if (news.problem) this.setState({ gone: false, problem: news.problem });
    else if (news.data) this.setState({ gone: false, problem: null, data: news.data });
    else if (this.state.gone || this.state.problem) this.setState({ gone: false, problem: null });
  }

  render(_, { data, problem, gone, smooth, all }) {
    const banners = html`
      ${gone && html`<${Gone} />`}
      ${problem && html`<${Banner} kind=${problem.kind} title=${TITLES[problem.kind]} text=${problem.text} />`}
    `;
    const back = html`<a class="back" href="#/">← All jobs</a>`;
    if (!data) return html`<main id="content" class="narrow">${back}${banners}${!problem && !gone && html`<p class="quiet">Reading…</p>`}</main>`;
    const { row } = data;
    const names = drawn(data.curves);
    const shown = all ? names : names.slice(0, FIRST_CURVES);
    return html`<main id="content">
      ${back}${banners}
      <header class="job">
        <h1>${row.name}</h1>
        <p class="line">
          <${Phase} phase=${row.phase} />
          <span class="quiet">${row.where}</span>
          <span>${[row.algorithm && row.algorithm.toUpperCase(), row.model].filter(Boolean).join(" · ")}</span>
        </p>
        ${row.message && html`<p class="message">${row.reason ? `${row.reason}: ` : ""}${row.message}</p>`}
        <p class="line"><${Bar} row=${row} /> ${row.eta && html`<span>${row.eta} left</span>`}
          ${row.score && html`<span>${named(row.score_name || "score")} <strong class="number">${amount(row.score)}</strong></span>`}</p>
        ${data.bottleneck && html`<p class="message">
          <strong>Bottleneck: ${data.bottleneck.phase}</strong>${data.bottleneck.share && ` (${share(data.bottleneck.share)} of the time)`} ${data.bottleneck.advice}
        </p>`}
      </header>
      ${data.traceback && html`<section><h2>Error</h2><pre class="text error" tabindex="0">${data.traceback}</pre></section>`}
      <section aria-label="Curves">
        <h2>Curves</h2>
        ${names.length > 0 && html`<p class="line">
          <label><input type="checkbox" checked=${smooth} onChange=${(event) => this.setState({ smooth: event.target.checked })} /> Smooth</label>
          ${data.curves.mean_of > 1 && html`<span class="quiet">each point is the mean of ${data.curves.mean_of} steps</span>`}
        </p>`}
        <div class="charts">
          ${shown.map((name) => html`<${Chart} key=${name} name=${name} steps=${data.curves.steps} values=${data.curves.metrics[name]} smooth=${smooth} />`)}
        </div>
        ${names.length > FIRST_CURVES && html`<button onClick=${() => this.setState({ all: !all })}>${all ? "Fewer curves" : `All ${names.length} curves`}</button>`}
        ${names.length === 0 && html`<p class="quiet">No curve yet: there is none before the first step.</p>`}
      </section>
      <div class="columns">
        ${data.samples.length > 0 && html`<section aria-label="Samples">
          <h2>Sample completions</h2>
          <div class="samples">${data.samples.map((sample, index) => html`<${Sample} key=${index} sample=${sample} />`)}</div>
        </section>`}
        <div>
          ${data.replicas && html`<${Replicas} replicas=${data.replicas} />`}
          ${data.attempts.length > 0 && html`<${Attempts} attempts=${data.attempts} />`}
          <section aria-label="Facts">
            <h2>Facts</h2>
            <dl class="facts">
              ${data.facts.map(([name, text]) => html`<div><dt>${name}</dt><dd>${/^\d{4}-\d\d-\d\dT/.test(text) ? clock(text) : text}</dd></div>`)}
              ${row.created && html`<div><dt>Created</dt><dd>${clock(row.created)}</dd></div>`}
            </dl>
            ${Object.keys(data.metrics).length > 0 && html`<details><summary>Newest metrics</summary>
              <dl class="facts">${Object.entries(data.metrics).map(([name, text]) => html`<div><dt>${named(name)}</dt><dd class="number">${text}</dd></div>`)}</dl>
            </details>`}
            ${data.conditions.length > 0 && html`<details><summary>Conditions</summary>
              <dl class="facts">${data.conditions.map((one) => html`<div><dt>${one.type} ${one.status}</dt><dd>${one.reason}${one.message && `: ${one.message}`}</dd></div>`)}</dl>
            </details>`}
          </section>
        </div>
      </div>
      ${data.log !== null && data.log.length > 0 && html`<${Log} lines=${data.log} />`}
      ${data.notes.map((note) => html`<p class="quiet note">${note}</p>`)}
    </main>`;
  }
}

// Metrics with something to draw; those that never change come last.
function drawn(curves) {
  const names = Object.keys(curves.metrics || {});
  const changes = (name) => new Set(curves.metrics[name].filter((value) => value !== null)).size > 1;
  return [...names.filter(changes), ...names.filter((name) => !changes(name))];
}

function share(text) {
  const number = Number(text);
  return Number.isFinite(number) ? `${Math.round(100 * number)} %` : text;
}

function Sample({ sample }) {
  return html`<article class="sample">
    <p class="line"><span class="quiet">step ${sample.step}</span>
      <span>reward <strong class="number">${sample.reward === null ? "none" : amount(sample.reward)}</strong></span></p>
    <pre class="text prompt" tabindex="0">${sample.prompt}</pre>
    <pre class="text completion" tabindex="0">${sample.completion}</pre>
    ${sample.others && html`<dl class="facts">${Object.entries(sample.others).map(([name, text]) => html`<div><dt>${named(name)}</dt><dd>${text}</dd></div>`)}</dl>`}
  </article>`;
}

function Attempts({ attempts }) {
  return html`<section aria-label="Attempts">
    <h2>Attempts</h2>
    <ol class="attempts">
      ${attempts.map((one) => html`<li key=${one.number} value=${one.number}>
        <p class="line"><strong>${one.cause || "Live"}</strong>
          ${one.counted && html`<span class="quiet">counts towards backoffLimit</span>`}
          ${one.exit_code !== undefined && html`<span class="quiet">exit code ${one.exit_code}</span>`}
          <span class="quiet">steps ${one.from_step ?? 0} → ${one.to_step ?? "?"}</span>
          ${one.start_time && html`<span class="quiet">${between(one.start_time, one.end_time)}</span>`}
        </p>
        ${one.message && html`<p>${one.message}</p>`}
      </li>`)}
    </ol>
  </section>`;
}

function Replicas({ replicas }) {
  return html`<section aria-label="Rollout replicas">
    <h2>Rollout replicas</h2>
    <p>${replicas.ready ?? "?"} of ${replicas.replicas ?? "?"} ready${replicas.weightVersion !== undefined && `, weights of step ${replicas.weightVersion}`}</p>
    <ul class="members">
      ${replicas.members.map((one) => html`<li key=${one.name}>
        <strong>${one.name}</strong> <span>${one.state}</span>
        ${one.weightVersion && html`<span class="quiet">weights ${one.weightVersion}</span>`}
        ${one.tokensPerSecond && html`<span class="quiet">${amount(one.tokensPerSecond)} tokens/s</span>`}
        ${one.message && html`<p>${one.message}</p>`}
      </li>`)}
    </ul>
  </section>`;
}

// The newest lines are in sight until the reader scrolls up.
class Log extends Component {
  constructor(props) {
    super(props);
    this.place = (element) => {
      this.element = element;
    };
  }

  getSnapshotBeforeUpdate() {
    const { scrollTop, clientHeight, scrollHeight } = this.element;
    return scrollTop + clientHeight >= scrollHeight - 8;
  }

  componentDidMount() {
    this.element.scrollTop = this.element.scrollHeight;
  }

  componentDidUpdate(_, __, wasAtEnd) {
    if (wasAtEnd) this.element.scrollTop = this.element.scrollHeight;
  }

  render({ lines }) {
    return html`<section aria-label="Log"><h2>Log</h2><pre class="text log" tabindex="0" ref=${this.place}>${lines.join("\n")}</pre></section>`;
  }
}
