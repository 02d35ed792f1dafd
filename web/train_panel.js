/** The live panel of Train Face LoRA: how the training stands, on every page that shows the node. */

import { app } from "../../scripts/app.js"
import { api } from "../../scripts/api.js"
import { drawChart, short } from "./chart.js"

const NODE = "FaceLoRATrain"
const EVENT = "facelora.training"
const IDLE_HEIGHT = 28
const ACTIVE = new Set(["done", "stopped", undefined])
const SERIES = { history: "loss", learning_rates: "learning_rate", likenesses: "likeness" }

/** Execution id of a node -> the last known state of its training, as GET /facelora/training gives it. */
const states = new Map()
const panels = new Set()

const STYLE = `
.facelora-panel { display: flex; flex-direction: column; gap: 6px; overflow: hidden; box-sizing: border-box;
  padding: 4px 2px; font: 12px sans-serif; color: var(--input-text, #ddd); }
.facelora-panel [hidden] { display: none !important; }
.facelora-quiet { color: var(--descrip-text, #999); }
.facelora-row { display: flex; gap: 6px; align-items: center; }
.facelora-panel > * { flex: none; }
.facelora-status { overflow: hidden; text-overflow: ellipsis; white-space: nowrap; }
.facelora-panel button { font: inherit; padding: 3px 8px; border-radius: 4px; cursor: pointer;
  color: var(--input-text, #ddd); background: var(--comfy-input-bg, #222); border: 1px solid var(--border-color, #555); }
.facelora-panel button:disabled { opacity: 0.4; cursor: default; }
.facelora-bar { flex: 1; height: 4px; border-radius: 2px; background: var(--comfy-input-bg, #222); }
.facelora-bar > div { height: 100%; width: 0; border-radius: 2px; background: #3b82f6; }
.facelora-panel svg { display: block; width: 100%; }
.facelora-panel svg text { font: 8px sans-serif; fill: var(--descrip-text, #999); }
.facelora-panel polyline { fill: none; stroke-width: 1.4; }
.facelora-frame { fill: var(--comfy-input-bg, #222); stroke: var(--border-color, #555); stroke-width: 0.5; }
.facelora-pictures { display: grid; grid-template-columns: 1fr 1fr; gap: 6px; }
.facelora-strip { display: flex; gap: 3px; height: 84px; overflow-x: auto; }
.facelora-strip img { height: 100%; border-radius: 3px; }
.facelora-warning { color: #fbbf24; }
`

function make(name, className, ...children) {
  const made = document.createElement(name)
  made.className = className
  made.append(...children)
  return made
}

const svg = () => document.createElementNS("http://www.w3.org/2000/svg", "svg")

/** 75 -> "1 min 15 s" */
function duration(seconds) {
  const whole = Math.round(seconds)
  if (whole < 60) return `${whole} s`
  if (whole < 3600) return `${Math.floor(whole / 60)} min ${whole % 60} s`
  return `${Math.floor(whole / 3600)} h ${Math.floor((whole % 3600) / 60)} min`
}

function statusText(state) {
  if (state.stopping && state.phase === "training") return `ending after step ${state.step}, keeping what is learned`
  if (state.phase === "done") return `done: ${state.file}`
  if (state.phase === "stopped") return "cancelled; queue again to go on from there"
  if (state.phase !== "training") return state.total ? `${state.phase}: ${state.done} of ${state.total}` : state.phase
  const parts = [`step ${state.step} of ${state.steps}`, `loss ${short(state.loss)}`, `rate ${short(state.learning_rate)}`]
  if (state.likeness != null) parts.push(`likeness ${state.likeness.toFixed(2)}`)
  if (state.seconds_left != null) parts.push(`${duration(state.seconds_left)} left`)
  return parts.join(" · ")
}

function doneShare(state) {
  if (state.phase === "done") return 1
  const [done, total] = "step" in state ? [state.step, state.steps] : [state.done, state.total]
  return total ? done / total : 0
}

class Panel {
  constructor(node) {
    this.node = node
    this.status = make("div", "facelora-status facelora-quiet", "The training shows here: loss, samples, likeness.")
    this.keep = make("button", "facelora-keep", "Stop and keep")
    this.keep.title = "Ends the training now and keeps what it has learned"
    this.cancel = make("button", "facelora-cancel", "Cancel")
    this.cancel.title = "Ends the training; queued again, it goes on from there"
    this.bar = make("div", "")
    this.progress = make("div", "facelora-bar", this.bar)
    this.loss = make("div", "facelora-loss", svg())
    this.likeness = make("div", "facelora-likeness", svg())
    this.photos = make("div", "facelora-strip facelora-photos")
    this.samples = make("div", "facelora-strip facelora-samples")
    this.samplesTitle = make("div", "facelora-quiet", "samples")
    this.pictures = make("div", "facelora-pictures",
      make("div", "facelora-quiet", "photos"), this.samplesTitle, this.photos, this.samples)
    this.warning = make("div", "facelora-warning")
    this.root = make("div", "facelora-panel",
      this.status, make("div", "facelora-row", this.progress, this.keep, this.cancel), this.warning, this.loss, this.likeness, this.pictures)
    this.keep.addEventListener("click", () => this.stopAndKeep())
    this.cancel.addEventListener("click", () => api.interrupt(null))
    for (const part of [this.keep, this.cancel, this.progress, this.warning, this.loss, this.likeness, this.pictures])
      part.hidden = true
    this.height = IDLE_HEIGHT
  }

  /** Whether an execution id, such as "5" or in a subgraph "12:5", is this node's. */
  is(id) {
    return id === String(this.node.id) || id.endsWith(`:${this.node.id}`)
  }

  async stopAndKeep() {
    this.keep.disabled = true
    for (const id of states.keys())
      if (this.is(id)) await api.fetchApi("/facelora/stop", { method: "POST", body: JSON.stringify({ node: id }) })
  }

  show(state) {
    const active = !ACTIVE.has(state.phase)
    this.status.textContent = this.status.title = statusText(state)
    this.status.classList.remove("facelora-quiet")
    this.progress.hidden = false
    this.bar.style.width = `${100 * doneShare(state)}%`
    this.keep.hidden = this.cancel.hidden = !active
    this.keep.disabled = state.phase !== "training" || state.stopping === true || state.can_keep === false
    this.warning.hidden = !state.warning
    this.warning.textContent = state.warning ?? ""
    const last = state.steps ?? state.history?.at(-1)?.[0] ?? 0
    this.loss.hidden = !state.history?.length
    this.likeness.hidden = !state.likenesses?.length
    if (!this.loss.hidden)
      drawChart(this.loss.firstChild, [
        { name: "loss", points: state.history, colour: "#60a5fa" },
        { name: "learning rate", points: state.learning_rates ?? [], colour: "#f59e0b" },
      ], last)
    if (!this.likeness.hidden)
      drawChart(this.likeness.firstChild, [{ name: "likeness", points: state.likenesses, colour: "#34d399" }], last)
    this.pictures.hidden = !state.samples?.length && !state.photos?.length
    fill(this.photos, state.photos)
    fill(this.samples, state.samples)
    this.samplesTitle.textContent = state.samples?.length ? `samples, step ${state.samples_step}` : "samples"
    this.grow(active)
  }

  /** Makes room in the node for what the panel shows now. */
  grow(active) {
    const charts = Math.round(0.3 * (this.node.size[0] - 30))
    let height = active ? 62 : 44
    for (const [part, size] of [[this.warning, 20], [this.loss, charts + 6], [this.likeness, charts + 6], [this.pictures, 112]])
      if (!part.hidden) height += size
    if (height === this.height) return
    this.height = height
    const wanted = this.node.computeSize()[1]
    if (this.node.size[1] < wanted) this.node.setSize([this.node.size[0], wanted])
    this.node.setDirtyCanvas?.(true, true)
  }
}

/** Shows pictures given as data URLs; those that are shown already are left alone. */
function fill(strip, urls = []) {
  if (strip.shown === urls) return
  strip.shown = urls
  strip.replaceChildren(...urls.map((url) => Object.assign(document.createElement("img"), { src: url })))
}

/** Takes news of a training into its state. */
function merge(id, news) {
  const fresh = news.begin ? {} : (states.get(id) ?? {})
  const state = { ...fresh, ...news }
  for (const [series, value] of Object.entries(SERIES))
    if (value in news && "step" in news && !(series in news))
      state[series] = [...(state[series] ?? []).filter(([step]) => step < news.step), [news.step, news[value]]]
  states.set(id, state)
}

/** Shows a panel the state of its node, unless it is that of a node with the same id in another workflow. */
function refresh(panel) {
  const workflow = (app.rootGraph ?? app.graph)?.id
  for (const [id, state] of states)
    if (panel.is(id) && (!state.workflow || state.workflow === workflow)) panel.show(state)
}

async function readStates() {
  const answer = await api.fetchApi("/facelora/training")
  if (!answer.ok) return
  for (const [id, state] of Object.entries(await answer.json())) states.set(id, state)
  panels.forEach(refresh)
}

app.registerExtension({
  name: "facelora.trainPanel",
  async setup() {
    document.head.append(make("style", "", STYLE))
    api.addEventListener(EVENT, ({ detail: { node, ...news } }) => {
      merge(node, news)
      panels.forEach(refresh)
    })
    api.addEventListener("reconnected", readStates)
    await readStates()
  },
  nodeCreated(node) {
    if (node.comfyClass !== NODE) return
    const panel = new Panel(node)
    const widget = node.addDOMWidget("training", "facelora_training", panel.root, {
      serialize: false,
      hideOnZoom: false,
      getMinHeight: () => panel.height,
      getMaxHeight: () => Math.max(panel.height, IDLE_HEIGHT),
    })
    widget.serialize = false
    panels.add(panel)
    const removed = node.onRemoved
    node.onRemoved = function () {
      panels.delete(panel)
      return removed?.apply(this, arguments)
    }
  },
  // Only now do the nodes and the graph have their ids.
  afterConfigureGraph() {
    panels.forEach(refresh)
  },
})
