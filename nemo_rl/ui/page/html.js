// Preact's components written with tagged templates: every value that is put into one becomes text, never markup.
import { Component, h, render } from "../libraries/preact.js";
import htm from "../libraries/htm.js";

export const html = htm.bind(h);
export { Component, render };
