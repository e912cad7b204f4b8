// Asks the server: with the viewer's token, one question at a time, and only while somebody looks at the page.

const KEY = "nemo-rl-token";
const INTERVAL = 2000;
const INTERVAL_WHEN_GONE = 3000;

// The address that `nemo-rl ui` prints ends in #token=…, which is of use on this machine and until the server ends, so other
// tabs may have it. A token of the cluster that somebody typed stays in its tab.
export function takeTokenFromAddress() {
  const found = /^#token=([A-Za-z0-9._~+/=-]+)$/.exec(location.hash);
  if (found) {
    localStorage.setItem(KEY, found[1]);
    history.replaceState(null, "", `${location.pathname}${location.search}#/`);
  }
}

export function signIn(token) {
  sessionStorage.setItem(KEY, token.trim());
}

export function signOut() {
  sessionStorage.removeItem(KEY);
}

export function isSignedIn() {
  return sessionStorage.getItem(KEY) !== null;
}

function headers() {
  const token = sessionStorage.getItem(KEY) || localStorage.getItem(KEY);
  return token ? { Authorization: `Bearer ${token}` } : {};
}

// Calls `show` with {data} after each change, {problem} for a refusal, {gone: true} while the server does not answer.
export class Poll {
  constructor(path, show) {
    this.path = path;
    this.show = show;
    this.tag = null;
    this.timer = null;
    this.stopped = false;
    this.asking = false;
    this.onVisible = () => {
      if (!document.hidden) this.ask();
    };
    document.addEventListener("visibilitychange", this.onVisible);
    this.ask();
  }

  stop() {
    this.stopped = true;
    clearTimeout(this.timer);
    document.removeEventListener("visibilitychange", this.onVisible);
  }

  async ask() {
    clearTimeout(this.timer);
    if (this.stopped || document.hidden || this.asking) return;
    this.asking = true;
    let pause = INTERVAL;
    try {
      const wanted = headers();
      if (this.tag) wanted["If-None-Match"] = this.tag;
      const answer = await fetch(this.path, { headers: wanted, cache: "no-store", signal: AbortSignal.timeout(20000) });
      if (this.stopped) return;
      if (answer.status === 304) {
        this.show({});
      } else {
        const content = await answer.json();
        this.tag = answer.ok ? answer.headers.get("ETag") : null;
        this.show(answer.ok ? { data: content } : { problem: content.problem, own_token: content.own_token });
      }
    } catch {
      if (this.stopped) return;
      this.tag = null;
      pause = INTERVAL_WHEN_GONE;
      this.show({ gone: true });
    } finally {
      this.asking = false;
    }
    this.timer = setTimeout(() => this.ask(), pause);
  }
}
