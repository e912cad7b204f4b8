// The page: which view is shown, by the part of the address behind the #, and the keyboard.
import { takeTokenFromAddress } from "./api.js";
import { Component, html, render } from "./html.js";
import { Job } from "./job.js";
import { List } from "./list.js";

takeTokenFromAddress();

function route() {
  const [path, search] = location.hash.replace(/^#/, "").split("?");
  const query = new URLSearchParams(search || "");
  const job = /^\/job\/(.+)$/.exec(path);
  return {
    job: job ? decoded(job[1]) : null,
    query: query.get("q") || "",
    phase: query.get("phase") || "",
    namespace: query.get("namespace"),
  };
}

function decoded(text) {
  try {
    return decodeURIComponent(text);
  } catch {
    return text;
  }
}

function address({ query, phase, namespace }) {
  const found = new URLSearchParams();
  if (query) found.set("q", query);
  if (phase) found.set("phase", phase);
  if (namespace !== null) found.set("namespace", namespace);
  return `#/${found.size ? `?${found}` : ""}`;
}

class App extends Component {
  constructor(props) {
    super(props);
    this.state = route();
    this.list = "#/";
  }

  componentDidMount() {
    addEventListener("hashchange", () => {
      takeTokenFromAddress();
      this.setState(route());
    });
    addEventListener("keydown", (event) => this.key(event));
  }

  componentDidUpdate() {
    document.title = this.state.job ? `${this.state.job.split("/").pop()} · nemo-rl` : "nemo-rl";
  }

  // The filter is part of the address, so that it can be sent to somebody; typing makes no new page in the history.
  change(wanted) {
    const next = { ...this.state, ...wanted };
    history.replaceState(null, "", address(next));
    this.list = address(next);
    this.setState(next);
  }

  key(event) {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const filter = document.getElementById("filter");
    const typing = event.target instanceof HTMLElement && event.target.closest("input, textarea, select");
    if (event.key === "Escape") {
      if (this.state.job) location.hash = this.list;
      else if (typing === filter && filter) {
        this.change({ query: "" });
        filter.blur();
      }
    } else if (event.key === "/" && !typing && filter) {
      event.preventDefault();
      filter.focus();
    } else if (["ArrowDown", "ArrowUp"].includes(event.key) ? !typing || typing === filter : !typing && ["j", "k"].includes(event.key)) {
      if (this.move(event.key === "ArrowDown" || event.key === "j" ? 1 : -1)) event.preventDefault();
    }
  }

  // The focus goes from job to job.
  move(direction) {
    const links = [...document.querySelectorAll(".table .row a")];
    if (!links.length) return false;
    const at = links.indexOf(document.activeElement);
    const next = links[at < 0 ? 0 : Math.min(links.length - 1, Math.max(0, at + direction))];
    next.focus();
    next.scrollIntoView({ block: "nearest" });
    return true;
  }

  render(_, { job, query, phase, namespace }) {
    return html`<div>
      <a class="skip" href="#content" onClick=${(event) => (event.preventDefault(), document.getElementById("content").focus())}>To the content</a>
      <header class="top"><a href=${this.list} class="brand">nemo-rl</a><span class="quiet keys">/ filter · ↑ ↓ choose · Enter open · Esc back</span></header>
      ${job
        ? html`<${Job} key=${job} id=${job} />`
        : html`<${List} query=${query} phase=${phase} namespace=${namespace} change=${(wanted) => this.change(wanted)} />`}
    </div>`;
  }
}

render(html`<${App} />`, document.getElementById("app"));
