/** The live panel of Train Face LoRA: the progress of a training run, on every page that shows the node. */

import { app } from "../../scripts/app.js"
import { api } from "../../scripts/api.js"
import { short } from "./chart.js"
import {
  BASE_CHOSEN, INPUTS_CHANGED, PERSON_SHOWN, addElement, after, baseOf, inputsChanged, isApp, makeRoom, readReport, remember, showText, whenChanged, whenSet, widgetOf,
} from "./dom.js"
import { enlargeable, make } from "./elements.js"
import { FAILURE } from "./failures.js"
import { lacking, missingFiles, photosOf } from "./missing.js"
import { More } from "./more.js"
import { DELETED, RENAMED, lostText, showPeople } from "./people.js"
import {
  DONE, ENDED, FAILED, TRAINING, WAITING, doneShare, drawCurves, spanText, statusText, svg, timeText, verdictOf,
} from "./progress.js"
import { headshotTile, moreLike } from "./tiles.js"
import { OPENED_TODAY, OldApp } from "./upgrade.js"
import { say, saySentence, sayName } from "./words.js"

const NODE = "FaceLoRATrain"
const EVENT = "facelora.training"
const LEAST_HEIGHT = 62, GAP = 6, PADDING = 8 // in pixels, the latter two as in the style sheet
const STYLES = "FaceLoRAStylePack", SAMPLER = "FaceLoRASampler"
/** How long a run takes, by what is known of it. */
// say
const TAKES = { trains: "Takes {} on this machine", redraws: "Takes {} on this machine, and longer to redraw small faces",
  unknown: "How long it takes on this machine is not known" }

/** Workflow and node -> the last known state of its training, as GET /facelora/training gives it. */
const states = new Map()
const panels = new Set()
document.addEventListener(BASE_CHOSEN, () => panels.forEach((panel) => (baseOf(panel.node) === panel.base ? panel.explain() : panel.changed())))
document.addEventListener(FAILURE, ({ detail: { text, prompt } }) => panels.forEach(({ failure, state }) => {
  failure.textContent = state?.phase === FAILED && state.prompt === prompt ? "" : text // which the status shows
}))
document.addEventListener(OPENED_TODAY, () => panels.forEach((panel) => panel.bringBack())) // its values have changed the inputs
document.addEventListener(INPUTS_CHANGED, ({ detail }) => panels.forEach((panel) => panel.node === detail && panel.changed()))

/** The prompts of ended training runs that are no longer shown, because the node's inputs have changed since. */
const AWAY = "facelora.away"
const away = new Set(JSON.parse(sessionStorage.getItem(AWAY) ?? "[]"))

/** Puts a training run away, or shows it again, also after F5. */
function putAway(prompt, isAway) {
  if (away.has(prompt) === isAway) return
  isAway ? away.add(prompt) : away.delete(prompt)
  sessionStorage.setItem(AWAY, JSON.stringify([...away]))
}

/** The user's training runs that are queued and have not begun, as GET /facelora/waiting gives them. */
let waiting = []

class Panel {
  constructor(node) {
    this.node = node
    this.status = make("div", "facelora-status facelora-quiet")
    this.machine = make("button", "facelora-machine", say("This machine"))
    this.machine.title = say("Show this machine's hardware and packages, as a report to paste into a question")
    this.machine.addEventListener("click", async () => showText([await readReport("/facelora/machine"), this.forecast()].join("\n").trim()))
    this.people = make("button", "facelora-all", say("Trained people"))
    this.people.title = say("List all your training runs, to open or delete them")
    this.people.addEventListener("click", showPeople)
    this.keep = make("button", "facelora-keep", say("Stop and keep"))
    this.keep.title = say("End training now, draw and measure the last samples, and save the LoRA")
    this.cancel = make("button", "facelora-cancel", say("Cancel"))
    this.cancel.title = say("End training without saving. Run it again to continue")
    this.bar = make("div", "")
    this.progress = make("div", "facelora-bar", this.bar)
    this.time = make("span", "facelora-time facelora-quiet")
    this.loss = make("div", "facelora-loss", svg())
    this.likeness = make("div", "facelora-likeness", svg())
    this.steps = make("span", "facelora-steps")
    const useStep = make("span", "facelora-quiet", say("Use step"))
    useStep.title = useStep.textContent
    this.checkpoints = make("div", "facelora-checkpoints", useStep, this.steps)
    this.photos = make("div", "facelora-strip facelora-photos")
    this.samples = make("div", "facelora-strip facelora-samples")
    this.samplesTitle = make("div", "facelora-quiet")
    this.pictures = make("div", "facelora-pictures",
      make("div", "facelora-quiet", say("photos")), this.samplesTitle, this.photos, this.samples)
    this.headshots = make("div", "facelora-headshots")
    this.download = make("button", "facelora-download", say("Download all headshots"))
    this.download.addEventListener("click", () => download(this.state.person))
    this.after = make("div", "facelora-row", this.download)
    this.old = new OldApp()
    this.takes = make("div", "facelora-line facelora-quiet")
    this.lacks = make("div", "facelora-line facelora-warning")
    this.warning = make("div", "facelora-warning")
    this.failure = make("div", "facelora-refused")
    this.missing = make("div", "facelora-warning")
    this.ends = make("div", "facelora-row", this.progress, this.time, make("div", "facelora-ends", this.keep, this.cancel))
    this.root = make("div", "facelora-panel",
      make("div", "facelora-row", this.status, this.people, this.machine), this.ends,
      this.old.root, this.failure, this.takes, this.lacks, this.missing, this.warning, this.loss, this.likeness, this.checkpoints, this.pictures, this.headshots, this.after)
    this.keep.addEventListener("click", () => this.stopAndKeep())
    this.cancel.addEventListener("click", () => {
      this.cancelled = this.state.prompt // the server takes a while to answer
      this.show(this.state)
      if (this.state.phase === WAITING) api.deleteItem("queue", this.cancelled)
      else api.interrupt(this.cancelled) // only this prompt
    })
    whenChanged(node, widgetOf(node, "checkpoint"), () => this.mark())
    for (const widget of node.widgets.filter(({ name }) => !["name", "checkpoint"].includes(name)))
      whenSet(widget, () => inputsChanged(node))
    whenChanged(node, widgetOf(node, "recipe"), () => this.explain())
    whenSet(widgetOf(node, "name"), () => this.explain())
    after(node, "onConnectionsChange", () => this.explain())
    this.height = LEAST_HEIGHT
    const sizes = new ResizeObserver(() => requestAnimationFrame(() => this.fit()))
    for (const part of this.root.children) sizes.observe(part)
    this.rest()
  }

  /** Lets the styles show this person's headshots, or nobody's. */
  tellPerson() {
    const { person, headshots } = this.state ?? {}, shownPerson = `${person} ${headshots?.length}`
    if (shownPerson === this.shownPerson) return
    this.shownPerson = shownPerson
    document.dispatchEvent(new CustomEvent(PERSON_SHOWN, { detail: { train: this.node, person: headshots?.length ? person : undefined } }))
  }

  /** Shows no training run. */
  rest() {
    this.state = undefined
    this.tellPerson()
    for (const part of [this.ends, this.missing, this.warning, this.loss, this.likeness, this.checkpoints, this.pictures, this.headshots,
      this.after]) part.hidden = true
    this.status.textContent = say("Loss, samples and likeness appear here during training.")
    this.status.className = "facelora-status facelora-quiet"
    this.time.textContent = this.status.title = ""
    this.machine.hidden = this.takes.hidden = this.lacks.hidden = false
  }

  /** Shows what the next training run does instead of one that has ended: the inputs have changed since. */
  changed() {
    const { phase, prompt, ended } = this.state ?? (this.lost || {})
    this.lost = false
    if (prompt && ENDED.has(phase) && (phase !== DONE || ended)) {
      putAway(prompt, true)
      this.rest()
    }
    this.explain()
  }

  /** Shows the last training run again. */
  bringBack() {
    for (const state of states.values()) if (isOf(this, state)) putAway(state.prompt, false)
    refresh(this)
  }

  /** Shows the recipe's numbers for the base model, and which files are missing, until a training run is shown. */
  async explain() {
    this.base = baseOf(this.node)
    this.old.show(this.more.nodes())
    if (!this.state) this.missing.hidden = !missingFiles(this.missing)
    const { value: recipe } = widgetOf(this.node, "recipe"), base = baseOf(this.node)
    const own = Object.fromEntries(this.node.widgets.filter(({ name, value }) => name === "settings" || typeof value === "number")
      .map(({ name, value }) => [name, value]))
    const asked = (this.asked = String(new URLSearchParams({ name: recipe, base, photos: photosOf(this.node), lora: widgetOf(this.node, "name").value.trim(), ...own })))
    this.lack()
    const answer = await api.fetchApi(`/facelora/recipe?${asked}`)
    const { error, wrong_name, steps, batch_size, rank, learning_rate, resolution } = answer.status < 500 ? await answer.json() : {}
    if (asked === this.asked) this.lack(wrong_name ?? "")
    if (this.state || asked !== this.asked) return
    if (error) this.status.textContent = error
    clearTimeout(this.soon)
    this.foreseen = undefined // an answer on its way is for other inputs
    if (!steps) {
      this.takes.textContent = base && !error && this.missing.hidden ? say(TAKES.unknown) : ""
      return
    }
    const plan = say("{}: {} steps × {}, rank {}, learning rate {}, {} px", sayName(recipe), steps, batch_size, rank, short(learning_rate),
      resolution)
    // Lines break between numbers, not in them. Chinese has no spaces there.
    const parts = plan.split(/(?<=,) |(?<=[，：])/).map((part) => make("span", "facelora-whole", part))
    this.status.replaceChildren(...parts.flatMap((part) => [part, plan.includes(", ") ? " " : make("wbr", "")]))
    this.soon = setTimeout(() => this.foresee(base, own), 300) // once nothing has changed for a moment
  }

  /** Shows what the next training run lacks, and what is wrong with its name or with the LoRA of the last one. */
  lack(wrong = this.wrong) {
    this.wrong = wrong
    const lacks = lacking(this.node), needed = lacks.length ? say("Still needed: {}", lacks.join(say(", "))) : ""
    this.lacks.textContent = [this.lost ? lostText(this.lost) : "", saySentence(wrong), needed].filter(Boolean).join("\n")
  }

  /** Shows how long the next training run and its headshots take on this machine. */
  async foresee(base, own) {
    if (!this.node.graph) return // removed meanwhile
    const pictures = this.node.graph.nodes.filter(({ comfyClass }) => comfyClass === STYLES)
      .reduce((sum, node) => sum + widgetOf(node, "count").value, 0)
    const asked = (this.foreseen = String(new URLSearchParams({ base, ...own, photos: photosOf(this.node), pictures })))
    const answer = await api.fetchApi(`/facelora/forecast?${asked}`)
    const spans = answer.ok ? await answer.json() : {} // null while a prompt runs
    if (asked !== this.foreseen) return
    this.more.foresee(spans ?? {})
    const span = spans?.[widgetOf(this.node, "recipe").value]
    if (span) this.takes.textContent = say(this.more.redraws() ? TAKES.redraws : TAKES.trains, spanText(span))
    else this.takes.textContent = spans ? say(TAKES.unknown) : ""
  }

  /** The same for each recipe, as lines of text. */
  forecast() {
    return Object.entries(this.more.spans).map(([recipe, span]) => `${sayName(recipe)}: ${spanText(span)}`).join("\n")
  }

  /** Whether an execution id, such as "5" or in a subgraph "12:5", is this node's. */
  is(id) {
    const path = id.split(":"), own = path.pop()
    const graph = path.reduce((outer, subgraph) => outer?.getNodeById(subgraph)?.subgraph, rootGraph())
    return own === String(this.node.id) && graph === this.node.graph
  }

  async stopAndKeep() {
    this.keep.disabled = true
    const headers = { "Content-Type": "application/json" }, { prompt, node } = this.state
    await api.fetchApi("/facelora/stop", { method: "POST", headers, body: JSON.stringify({ prompt, node }) })
  }

  show(state) {
    const active = !ENDED.has(state.phase), isNew = state.prompt !== this.state?.prompt
    this.state = state
    if (active && isNew && isApp()) this.root.scrollIntoView()
    this.status.textContent = this.status.title = state.lost ? lostText(state) : statusText(state)
    this.status.className = `facelora-status facelora-says-${state.phase === FAILED ? "rejected" : verdictOf(state)}`
    this.bar.className = `facelora-is-${verdictOf(state)}`
    this.ends.hidden = false
    this.missing.hidden = this.takes.hidden = true
    this.lacks.hidden = active
    this.tick()
    this.bar.style.width = `${100 * doneShare(state)}%`
    this.cancel.hidden = !active
    this.keep.hidden = !active || state.phase === WAITING
    this.cancel.disabled = this.cancelled === state.prompt
    this.cancel.textContent = this.cancel.disabled ? say("Cancelling") : say("Cancel")
    this.machine.hidden = state.phase !== FAILED
    this.keep.disabled = !TRAINING.has(state.phase) || state.stopping === true
    this.warning.hidden = !state.warning
    this.warning.textContent = saySentence(state.warning) ?? ""
    drawCurves(state, this.loss, this.likeness)
    this.offer(state.checkpoints)
    this.pictures.hidden = !state.samples?.length && !state.photos?.length
    fill(this.photos, state.photos, picture(say("photos")))
    const title = state.samples?.length ? say("samples, step {}", state.samples_step) : say("samples")
    this.samplesTitle.textContent = title
    fill(this.samples, state.samples, picture(title))
    this.headshots.hidden = !state.headshots?.length
    this.after.hidden = this.headshots.hidden || !state.person
    fill(this.headshots, state.headshots, (shot) => headshot(shot, state.limits))
    this.tellPerson()
    this.fit()
  }

  /** Shows the time. The clock runs on until the server sends its time again. */
  tick() {
    const { state } = this
    if (state) this.time.textContent = timeText(state, ENDED.has(state.phase) ? 0 : (performance.now() - state.newsTime) / 1000)
  }

  /** Shows a button for each measured step. The node's input `checkpoint` is the chosen step; 0 is the kept one. */
  offer(choices = []) {
    this.checkpoints.hidden = choices.length < 2
    fill(this.steps, choices, ({ step, likeness, kept }) => {
      const button = make("button", "", `${step}`)
      button.title = say("Likeness {}. The next run outputs this step's LoRA, without training again", likeness.toFixed(2))
      button.dataset.checkpoint = kept ? 0 : step
      button.addEventListener("click", () => {
        widgetOf(this.node, "checkpoint").value = kept ? 0 : step
        this.mark()
        this.node.graph?.change?.()
      })
      return button
    })
    this.mark()
  }

  /** Shows which step is chosen. */
  mark() {
    const chosen = String(widgetOf(this.node, "checkpoint").value)
    for (const button of this.checkpoints.querySelectorAll("button"))
      button.setAttribute("aria-pressed", button.dataset.checkpoint === chosen)
  }

  /** Makes room in the node for all that the panel shows. */
  fit() {
    if (!this.root.offsetHeight) return // not on the page
    this.root.style.setProperty("--facelora-strip", `${Math.round(0.3 * this.root.clientWidth)}px`)
    const heights = [...this.root.children].map(({ offsetHeight }) => offsetHeight).filter(Boolean)
    const height = heights.reduce((sum, one) => sum + one + GAP, PADDING - GAP)
    if (height === this.height) return
    this.height = height
    makeRoom(this.node)
  }
}

/** A headshot with its likeness to the person, and a button for more pictures like it. */
function headshot({ filename, subfolder, type, score, seed, style }, limits) {
  const src = api.apiURL(`/view?${new URLSearchParams({ filename, subfolder, type })}`)
  const button = score == null || seed == null ? [] : [moreLike(() => drawMoreLike(src, seed))]
  return headshotTile(src, sayName(style ?? filename), score, limits, button)
}

/** Runs the prompt that a picture contains once more, for variations of the picture with that seed. */
async function drawMoreLike(src, vary) {
  const { getPngMetadata } = window.comfyAPI.pnginfo
  const [{ prompt }, { workflow }] = await Promise.all([getPngMetadata(await (await fetch(src)).blob()), app.graphToPrompt()])
  const output = JSON.parse(prompt), nodes = Object.values(output)
  for (const { inputs } of nodes.filter(({ class_type }) => [STYLES, SAMPLER].includes(class_type))) inputs.vary = vary
  for (const { inputs } of nodes.filter(({ class_type }) => class_type === STYLES))
    inputs.variation_seed = Math.floor(Math.random() * 2 ** 32)
  await api.queuePrompt(0, { output, workflow })
}

/** Saves all headshots of a person as one file. The server sends it only to their user, so a link can't load it directly. */
async function download(person) {
  const answer = await api.fetchApi(`/facelora/people/${person}/headshots`)
  const name = decodeURIComponent(/''(.*)$/.exec(answer.headers.get("Content-Disposition"))[1])
  const href = URL.createObjectURL(await answer.blob())
  Object.assign(document.createElement("a"), { href, download: name }).click()
  URL.revokeObjectURL(href)
}

/** Makes a picture of a data URL, named by the title and its number. */
const picture = (title) => (src, i) => enlargeable(Object.assign(make("img", ""), { src, alt: `${title}: ${i + 1}` }))

/** Shows what is made of each item. What is already shown stays unchanged, and so keeps the keyboard's focus. */
function fill(element, items, made) {
  if (element.shown === items) return
  element.shown = items
  element.replaceChildren(...(items ?? []).map(made))
}

const rootGraph = () => app.rootGraph ?? app.graph

const place = ({ workflow, node }) => `${workflow} ${node}`

/** Adds news of a training run to its state. */
function merge({ points, ...news }) {
  const before = states.get(place(news))
  const state = { ...(news.begin || before?.prompt !== news.prompt ? {} : before), ...news }
  if (news.seconds != null) state.newsTime = performance.now()
  for (const [series, point] of Object.entries(points))
    state[series] = [...(state[series] ?? []).filter(([step]) => step < point[0]), point]
  states.set(place(news), state)
}

/** Whether a training run is of a panel's node. A node with the same id in another workflow is ignored. */
const isOf = (panel, { workflow, node }) => workflow === rootGraph()?.id && panel.is(node)

/** Shows a panel the state of its node. */
function refresh(panel) {
  const own = (state) => isOf(panel, state)
  const state = [...states.values()].findLast((state) => own(state) && !away.has(state.prompt)), next = waiting.find(own)
  const isLost = state?.lost === "trained"
  const isOver = !state || isLost || (ENDED.has(state.phase) && (state.phase !== DONE || state.ended))
  const wasLost = panel.lost
  panel.lost = isLost && state
  if (next && isOver) panel.show(next)
  else if (isLost) {
    if (panel.state || !wasLost) panel.rest()
    if (!wasLost) panel.explain()
  }
  else if (state) panel.show(state)
  else if (panel.state?.phase === WAITING) {
    panel.rest()
    panel.explain()
  }
}

async function readWaiting() {
  if (!panels.size) return
  const answer = await api.fetchApi("/facelora/waiting")
  waiting = answer.ok ? await answer.json() : []
  panels.forEach(refresh)
}

// Deleted training runs are no longer shown.
document.addEventListener(DELETED, async () => {
  states.clear()
  await readStates()
  for (const panel of panels) if (panel.state && ![...states.values()].some(({ prompt }) => prompt === panel.state.prompt)) panel.rest()
  panels.forEach((panel) => panel.explain())
})

// A graph that shows a renamed training run doesn't make a copy under the old name.
document.addEventListener(RENAMED, ({ detail: { key, name } }) => {
  for (const { node } of [...panels].filter(({ state }) => state?.person === key)) {
    widgetOf(node, "name").value = name
    remember(node)
  }
})

let known // the id of this page on the server, once the server has been told its user

async function readStates() {
  known = api.clientId
  const answer = await api.fetchApi(`/facelora/training?client=${encodeURIComponent(known)}`)
  if (!answer.ok) return
  for (const state of await answer.json()) states.set(place(state), { ...state, newsTime: performance.now() })
  panels.forEach(refresh)
}

app.registerExtension({
  name: "facelora.trainPanel",
  async setup() {
    api.addEventListener(EVENT, ({ detail }) => {
      putAway(detail.prompt, false)
      merge(detail)
      panels.forEach(refresh)
    })
    setInterval(() => panels.forEach((panel) => panel.tick()), 1000)
    api.addEventListener("reconnected", readStates)
    addEventListener("focus", readStates) // files may have been deleted
    api.addEventListener("status", () => {
      if (known !== api.clientId) readStates()
      readWaiting()
    })
    await readStates()
  },
  /** After R, which reads the lists of files again. */
  refreshComboInNodes() {
    panels.forEach((panel) => panel.explain())
  },
  nodeCreated(node) {
    if (node.comfyClass === STYLES) whenSet(widgetOf(node, "count"), () => panels.forEach((panel) => panel.explain()))
    if (node.comfyClass !== NODE) return
    const panel = new Panel(node)
    panel.more = new More(node, () => panel.explain())
    addElement(node, "training", panel.root, () => panel.height)
    // ComfyUI's app mode gets the samples as previews. Without this, they would also appear below the panel.
    Object.defineProperty(node, "imgs", { get() {}, set() {} })
    panels.add(panel)
    after(node, "onRemoved", () => panels.delete(panel))
    // Loaders list the new LoRA, also in workflows that are opened later.
    after(node, "onExecuted", ({ lora_name: [name] = [] }) => {
      if (name) app.reloadNodeDefs?.()
      panel.bringBack() // ComfyUI may have reused the result of a run that was put away
    })
  },
  // The nodes and the graph have no ids before this.
  afterConfigureGraph() {
    panels.forEach(refresh)
    panels.forEach((panel) => panel.explain())
    readWaiting()
  },
})
