/** Workflows that an older version saved: their headshots get the mark, and their app can be opened as today's. */

import { app } from "../../scripts/app.js"
import { api } from "../../scripts/api.js"
import { remember, widgetOf } from "./dom.js"
import { make } from "./elements.js"
import { pack } from "./templates.js"
import { say } from "./words.js"

const SAVE = "SaveImage", SAMPLER = "FaceLoRASampler", TRAIN = "FaceLoRATrain"
/** Where the old templates saved everybody's headshots, and where they are saved instead: by the name of the person. */
const OLD_PREFIX = "headshots/my-face", PREFIX = "headshots/%FaceLoRATrain.name%"
/** The nodes that pictures of a person come from. Each has what a file of an older version lacks. */
const SOURCES = {
  FaceLoRAApply: ({ outputs }) => !outputs?.some(({ name }) => name === "label"),
  FaceLoRAPerson: ({ inputs }) => !inputs?.some(({ name }) => name === "mask"),
}

/** The nodes of a saved graph that a node's inputs come from, directly or not. */
function* sources({ nodes, links }, id, seen = new Set([id])) {
  for (const link of links) {
    const [from, to] = Array.isArray(link) ? [link[1], link[3]] : [link.origin_id, link.target_id]
    if (to !== id || seen.has(from)) continue
    seen.add(from)
    yield* nodes.filter((node) => node.id === from)
    yield* sources({ nodes, links }, from, seen)
  }
}

app.registerExtension({
  name: "facelora.upgrade",
  /** Replaces each Save Image for headshots. Its name, place and value fit Save Headshots, and so does its id, which an app shows. */
  beforeConfigureGraph(graph) {
    const ofPeople = ({ id }) => [...sources(graph, id)].some((node) => SOURCES[node.type]?.(node))
    const saves = graph.nodes.filter((node) => node.type === SAVE && ofPeople(node))
    for (const save of saves) {
      save.type = "FaceLoRASaveHeadshots"
      if (save.widgets_values?.[0] === OLD_PREFIX && graph.nodes.some(({ type }) => type === TRAIN)) save.widgets_values = [PREFIX]
    }
    if (saves.length)
      app.extensionManager.toast.add({
        severity: "info", summary: "Save Headshots", life: 8000,
        detail: say("It replaces Save Image in this workflow of an older version: it saves each headshot once, and marks it as drawn."),
      })
  },
})

/** The event that today's app was opened for an old one. */
export const OPENED_TODAY = "facelora.opened-today"

/** The names of the model files that a saved graph's loaders offer to download. */
const modelsOf = ({ nodes }) => nodes.flatMap(({ properties }) => properties?.models ?? []).map(({ name }) => name)

/** Opens the app of today that has the same model files, with the values of the open one. */
async function openToday() {
  const old = app.rootGraph.serialize(), own = modelsOf(old)
  const values = app.rootGraph.nodes.flatMap(({ type, widgets = [] }) =>
    widgets.filter(({ serialize, value }) => serialize !== false && value !== PREFIX).map(({ name, value }) => [type, name, value]))
  const read = async (name) => (await api.fetchApi(`/workflow_templates/${encodeURIComponent(pack)}/${encodeURIComponent(name)}.json`)).json()
  const names = (await api.getWorkflowTemplates())[pack].filter((name) => name.endsWith(".app"))
  const apps = await Promise.all(names.map(read)), fits = apps.findIndex((one) => modelsOf(one).every((model) => own.includes(model)))
  const chosen = Math.max(fits, 0)
  await app.loadGraphData({ ...apps[chosen], id: old.id }, true, true, names[chosen]) // with the id of the training runs shown
  for (const [type, name, value] of values)
    for (const node of app.rootGraph.nodes.filter((node) => node.type === type)) {
      const widget = widgetOf(node, name)
      if (!widget || widget.value === value) continue
      widget.value = value
      widget.callback?.(value)
    }
  remember(app.rootGraph.nodes[0])
  document.dispatchEvent(new Event(OPENED_TODAY))
}

/** A line that offers it, hidden where the open app is of today, or not an app. */
export class OldApp {
  constructor() {
    const button = make("button", "", say("Open today's app with these values"))
    button.addEventListener("click", openToday)
    this.root = make("div", "facelora-line facelora-row", make("span", "facelora-quiet", say("This app is from an older version.")), button)
    this.root.hidden = true
  }

  /** `nodes` are those of the graph and of its subgraphs. */
  show(nodes) {
    const shown = app.rootGraph?.extra?.linearData?.inputs ?? []
    this.root.hidden = !shown.length || shown.some(([, name]) => name === "more") || nodes.some(({ type }) => type === SAMPLER)
  }
}
