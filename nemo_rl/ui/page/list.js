// The list of jobs and runs.
import { Poll, isSignedIn, signIn, signOut } from "./api.js";
import { Component, html } from "./html.js";
import { Banner, Bar, Gone, PHASES, Phase, SignIn, TITLES } from "./parts.js";
import { age, amount, named } from "./words.js";

const AGES_EVERY = 20000;

class Row extends Component {
  shouldComponentUpdate(next) {
    return next.text !== this.props.text || next.age !== this.props.age;
  }

  render({ row, age: old }) {
    const why = row.message || "";
    return html`<div class="row" role="row" data-phase=${row.phase}>
      <span role="cell" class="cell-name">
        <a href=${`#/job/${encodeURIComponent(row.key)}`}>${row.name}</a>
        <span class="quiet">${row.where}</span>
      </span>
      <span role="cell" class="cell-phase"><${Phase} phase=${row.phase} /></span>
      <span role="cell" class="cell-steps"><${Bar} row=${row} /></span>
      <span role="cell" class="cell-score" title=${row.score_name ? named(row.score_name) : undefined}>
        ${row.score && html`<span class="quiet">${named(row.score_name || "score")}</span> <span class="number">${amount(row.score)}</span>`}
      </span>
      <span role="cell" class="cell-eta number">${row.eta ? `${row.eta} left` : ""}</span>
      <span role="cell" class="cell-age number" title=${row.created}>${old}</span>
      <span role="cell" class="cell-what">${[row.algorithm && row.algorithm.toUpperCase(), row.model].filter(Boolean).join(" · ")}</span>
      <span role="cell" class="cell-why" title=${why}>${why}</span>
    </div>`;
  }
}

export class List extends Component {
  constructor(props) {
    super(props);
    this.state = { data: null, problem: null, gone: false, own_token: false };
  }

  componentDidMount() {
    this.begin();
    this.ages = setInterval(() => this.forceUpdate(), AGES_EVERY);
  }

  componentDidUpdate(before) {
    if (before.namespace !== this.props.namespace) this.begin();
  }

  componentWillUnmount() {
    this.poll.stop();
    clearInterval(this.ages);
  }

  begin() {
    if (this.poll) this.poll.stop();
    const { namespace } = this.props;
    const query = namespace === null ? "" : `?namespace=${encodeURIComponent(namespace)}`;
    this.poll = new Poll(`api/jobs${query}`, (news) => this.take(news));
  }

  take(news) {
    if (news.gone) this.setState({ gone: true });
    else if (news.problem) this.setState({ gone: false, problem: news.problem, own_token: news.own_token, data: null });
    else if (news.data) this.setState({ gone: false, problem: null, data: news.data, own_token: news.data.own_token });
    else if (this.state.gone) this.setState({ gone: false });
  }

  token(token) {
    signIn(token);
    this.begin();
  }

  render({ query, phase, change }, { data, problem, gone, own_token }) {
    if (problem) {
      return html`<main id="content" class="narrow">
        ${gone && html`<${Gone} />`}
        <${Banner} kind=${problem.kind} title=${TITLES[problem.kind]} text=${problem.text} />
        ${problem.kind === "sign-in" && own_token && html`<${SignIn} onToken=${(token) => this.token(token)} />`}
      </main>`;
    }
    if (!data) return html`<main id="content" class="narrow">${gone ? html`<${Gone} />` : html`<p class="quiet">Looking for jobs…</p>`}</main>`;
    const words = query.toLowerCase().split(/\s+/).filter(Boolean);
    const matching = data.jobs.filter((row) => {
      const text = [row.name, row.where, row.model, row.algorithm, row.phase, row.reason, row.message].filter(Boolean).join(" ").toLowerCase();
      return words.every((word) => text.includes(word));
    });
    const counts = new Map();
    for (const row of matching) counts.set(row.phase, (counts.get(row.phase) || 0) + 1);
    const shown = phase ? matching.filter((row) => row.phase === phase) : matching;
    const phases = PHASES.filter((name) => counts.has(name) || name === phase);
    const cluster = data.sources.find((source) => source.namespace !== null);
    return html`<main id="content">
      ${gone && html`<${Gone} />`}
      ${data.sources.map((source) => source.problem && html`<${Source} key=${source.title} source=${source} own=${own_token} onToken=${(token) => this.token(token)} />`)}
      <div class="tools">
        <input id="filter" type="search" placeholder="Filter by name, model, reason…  ( / )" aria-label="Filter" value=${query}
          onInput=${(event) => change({ query: event.target.value })} />
        ${cluster && html`<${Namespace} key=${cluster.namespace} namespace=${cluster.namespace} change=${change} />`}
        ${own_token && isSignedIn() && html`<button class="plain" onClick=${() => (signOut(), this.begin())}>Sign out</button>`}
      </div>
      <div class="chips" role="group" aria-label="Phase">
        <button aria-pressed=${phase === "" ? "true" : "false"} onClick=${() => change({ phase: "" })}>All ${matching.length}</button>
        ${phases.map((name) => html`<button key=${name} aria-pressed=${phase === name ? "true" : "false"}
          onClick=${() => change({ phase: phase === name ? "" : name })}>${name} ${counts.get(name) || 0}</button>`)}
      </div>
      <div class="table" role="table" aria-label="Jobs" aria-rowcount=${shown.length}>
        <div class="row head" role="row">
          ${["Name", "Phase", "Step", "Score", "Time left", "Age"].map((name) => html`<span role="columnheader">${name}</span>`)}
        </div>
        ${shown.map((row) => html`<${Row} key=${row.key} row=${row} text=${JSON.stringify(row)} age=${row.created ? age(row.created) : ""} />`)}
      </div>
      ${shown.length === 0 && html`<p class="quiet empty">${nothing(data, query, phase)}</p>`}
      ${data.sources.some((source) => source.more) && html`<p class="quiet">There are more jobs than are listed here; choose a namespace.</p>`}
    </main>`;
  }
}

function nothing(data, query, phase) {
  if (data.jobs.length) return `None of ${data.jobs.length} jobs is ${[phase, query && `like “${query}”`].filter(Boolean).join(" and ")}.`;
  if (data.sources.some((source) => source.problem)) return "";
  return "No jobs here yet. nemo_rl.train() or nemo-rl train JOB.yaml makes one, and it appears here by itself.";
}

function Source({ source, own, onToken }) {
  const { kind, text } = source.problem;
  const old = source.stale_since ? ` Shown is what was there at ${new Date(source.stale_since).toLocaleTimeString()}; it is tried again every few seconds.` : "";
  return html`<div>
    <${Banner} kind=${kind} title=${TITLES[kind]} text=${text + old} />
    ${kind === "sign-in" && own && html`<${SignIn} onToken=${onToken} />`}
  </div>`;
}

function Namespace({ namespace, change }) {
  const submit = (event) => {
    event.preventDefault();
    change({ namespace: new FormData(event.target).get("namespace").trim() });
  };
  return html`<form class="namespace" onSubmit=${submit}>
    <label for="namespace">Namespace</label>
    <input id="namespace" name="namespace" defaultValue=${namespace} placeholder="all" autocomplete="off" spellcheck="false" pattern="[a-z0-9]([a-z0-9\\-]*[a-z0-9])?" />
    <button type="submit">Show</button>
  </form>`;
}
