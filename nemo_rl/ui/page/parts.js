// Small parts that both views use.
import { html } from "./html.js";

const SIGNS = {
  Running: "▶",
  Starting: "◌",
  Pending: "…",
  Queued: "≡",
  Suspended: "❚❚",
  Stopped: "■",
  Failed: "✕",
  Succeeded: "✓",
};
export const PHASES = Object.keys(SIGNS);

export function Phase({ phase }) {
  const known = PHASES.includes(phase) ? phase.toLowerCase() : "pending";
  return html`<span class=${`phase phase-${known}`}><span aria-hidden="true">${SIGNS[phase] || "?"}</span> ${phase}</span>`;
}

export function Bar({ row }) {
  if (row.step === undefined) return null;
  const text = row.total_steps ? `${row.step}/${row.total_steps}` : `step ${row.step}`;
  return html`<span class="bar">
    ${row.total_steps && html`<progress max=${row.total_steps} value=${row.step} aria-label="Progress"></progress>`}
    <span class="number">${text}</span>
  </span>`;
}

export function Banner({ kind, title, text }) {
  return html`<div class=${`banner banner-${kind}`} role=${kind === "unreachable" ? "status" : "alert"}>
    <strong>${title}</strong> <span>${text}</span>
  </div>`;
}

export const TITLES = {
  "sign-in": "Sign in.",
  forbidden: "You have no right to see this.",
  unreachable: "The cluster does not answer.",
  absent: "This job is not there.",
  unusable: "This cannot be shown.",
};

export function Gone() {
  return html`<${Banner} kind="unreachable" title="The page's server does not answer."
    text="What you see is what was there last. It is tried again every few seconds; if you ended nemo-rl ui, start it anew and open the address that it prints." />`;
}

export function SignIn({ onToken }) {
  const submit = (event) => {
    event.preventDefault();
    const token = new FormData(event.target).get("token");
    if (token) onToken(token);
  };
  return html`<form class="sign-in" onSubmit=${submit}>
    <label for="token">Token of the cluster</label>
    <input id="token" name="token" type="password" autocomplete="off" spellcheck="false" required />
    <button type="submit">Sign in</button>
    <p>
      For example that of a service account of yours: <code>kubectl create token NAME -n NAMESPACE</code>. It stays in this
      tab, and this page asks the cluster with it and with nothing else.
    </p>
  </form>`;
}
