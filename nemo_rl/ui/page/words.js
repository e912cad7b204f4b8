// Numbers, times and names as people read them.

export function amount(value) {
  if (value === null || value === undefined || !Number.isFinite(Number(value))) return "–";
  const number = Number(value);
  const size = Math.abs(number);
  if (size >= 1000) return Math.round(number).toLocaleString("en");
  if (size !== 0 && size < 0.001) return Number(number.toPrecision(3)).toExponential();
  return String(Number(number.toPrecision(4)));
}

export function span(seconds) {
  const whole = Math.max(0, Math.round(seconds));
  if (whole < 60) return `${whole} s`;
  if (whole < 3600) return `${Math.floor(whole / 60)} min`;
  if (whole < 86400) return `${Math.floor(whole / 3600)} h ${Math.floor((whole % 3600) / 60)} min`;
  return `${Math.floor(whole / 86400)} d ${Math.floor((whole % 86400) / 3600)} h`;
}

export function age(moment) {
  const begin = Date.parse(moment);
  return Number.isNaN(begin) ? "" : span((Date.now() - begin) / 1000).replace(/ (h|d) .*/, " $1");
}

export function between(begin, end) {
  const seconds = ((end ? Date.parse(end) : Date.now()) - Date.parse(begin)) / 1000;
  return Number.isNaN(seconds) ? "" : span(seconds);
}

export function clock(moment) {
  const found = new Date(moment);
  return Number.isNaN(found.getTime()) ? String(moment) : found.toLocaleString();
}

export function named(metric) {
  return metric.replaceAll("_", " ");
}
