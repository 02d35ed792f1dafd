/** Code shared by the nodes' widgets: the style sheet, and calls to ComfyUI. */

import { app } from "../../scripts/app.js"
import { api } from "../../scripts/api.js"
import { make, openDialog } from "./elements.js"
import { say, speakChinese } from "./words.js"

speakChinese(() => app.extensionManager.setting.get("Comfy.Locale") === "zh")

document.head.append(Object.assign(document.createElement("link"), {
  rel: "stylesheet", href: new URL("./facelora.css", import.meta.url).href,
}))

const MARGIN = 4
/** The label above an element in ComfyUI's app mode. */
// say
const LABELS = { training: "Progress", thumbnails: "Photos", picker: "Styles", more: "More" }

const elements = new WeakSet()

/** Adds an element to a node. It is not saved or queued. `height` returns the pixels that it needs now. */
export function addElement(node, name, element, height) {
  const room = () => height() + 2 * MARGIN
  elements.add(element)
  const widget = node.addDOMWidget(name, `facelora_${name}`, element, {
    serialize: false, hideOnZoom: false, hideInPanel: true, margin: MARGIN, getMinHeight: room, getMaxHeight: room,
  })
  widget.serialize = false
  if (LABELS[name]) widget.label = say(LABELS[name])
  return widget
}

/** Whether the page shows ComfyUI's app mode, and not the graph. */
export const isApp = () => !document.querySelector("#graph-canvas")?.checkVisibility()

export const widgetOf = (node, name) => node.widgets?.find((widget) => widget.name === name)

/** The nodes of a type that are connected to an output of the node. */
export function fedBy(node, type) {
  const links = (node.outputs ?? []).flatMap((output) => output.links ?? [])
  const targets = links.map((id) => node.graph?.getNodeById(node.graph.links.get(id)?.target_id))
  return [...new Set(targets)].filter((target) => target?.comfyClass === type)
}

/** What a node's photos are for: an input of Train Face LoRA or of Likeness Score. They are the person's if nothing else is known. */
export function useOf(node) {
  const links = (node.outputs?.[0]?.links ?? []).map((id) => node.graph?.links.get(id)).filter(Boolean)
  const inputs = links.flatMap(({ target_id, target_slot }) => {
    const target = node.graph.getNodeById(target_id)
    return ["FaceLoRATrain", "FaceLoRALikeness"].includes(target?.comfyClass) ? [target.inputs[target_slot]?.name] : []
  })
  return ["photos", "class_photos", "reference"].find((name) => inputs.includes(name)) ?? "photos"
}

/** The node connected to an input of the node; undefined if there is none. */
export function feeding(node, input) {
  const link = node.graph?.links.get(node.inputs?.find(({ name }) => name === input)?.link)
  return link && node.graph.getNodeById(link.origin_id)
}

/** Whether another node is one of those that the node's inputs come from, directly or not. */
export function comesFrom(node, other, seen = new Set()) {
  if (node === other) return true
  if (!node || seen.has(node)) return false
  seen.add(node)
  return (node.inputs ?? []).some(({ name }) => comesFrom(feeding(node, name), other, seen))
}

/** The event that a Train Face LoRA shows another person, or more of their headshots: {train, person}, by the key of a record. */
export const PERSON_SHOWN = "facelora.person-shown"

/** The widgets of loaders in which a base model's file is chosen, and the event after a choice. */
const BASES = ["ckpt_name", "unet_name"]
export const BASE_CHOSEN = "facelora.base-chosen"

/** The base model's file for a node, by its name in the loader; "" if none is found. */
export function baseOf(node) {
  const model = feeding(node, "model")
  if (!model) return ""
  return BASES.map((name) => widgetOf(model, name)?.value).find(Boolean) ?? baseOf(model)
}

/** Puts elements back where the app shows them. */
const putBack = new MutationObserver((changes) => {
  for (const { target, removedNodes } of changes)
    for (const element of removedNodes)
      if (elements.has(element) && element.isConnected && !element.checkVisibility() && target.isConnected) target.append(element)
})

app.registerExtension({
  name: "facelora.elements",
  /** If two tabs have the same graph, as of two people, ComfyUI's hidden canvas takes the elements of the second from its app mode. */
  afterConfigureGraph() {
    if (!isApp()) return
    putBack.observe(document.body, { childList: true, subtree: true })
    setTimeout(() => putBack.disconnect(), 2000)
  },
})

app.registerExtension({
  name: "facelora.bases",
  nodeCreated(node) {
    for (const widget of BASES.map((name) => widgetOf(node, name)).filter(Boolean))
      whenSet(widget, () => document.dispatchEvent(new Event(BASE_CHOSEN)))
  },
})

/** Tells ComfyUI that a value of the node has changed, so that it is kept after F5. */
export function remember(node) {
  node.graph?.change?.()
  const tracker = app.extensionManager.workflow?.activeWorkflow?.changeTracker
  ;(tracker?.captureCanvasState ?? tracker?.checkState)?.call(tracker)
}

/** Shows a text with buttons to copy and to close it. A click outside closes it too. */
export function showText(text) {
  const shown = make("pre", "", text), copy = make("button", "", say("Copy")), close = make("button", "", say("Close"))
  const buttons = make("div", "facelora-row facelora-end", copy, close)
  const dialog = make("dialog", "facelora-dialog facelora-panel facelora-text", shown, buttons)
  copy.addEventListener("click", () => {
    getSelection().selectAllChildren(shown)
    document.execCommand("copy") // navigator.clipboard is missing on pages of other machines without HTTPS
    copy.textContent = say("Copied")
  })
  close.addEventListener("click", () => dialog.close())
  dialog.addEventListener("click", ({ target }) => target === dialog && dialog.close())
  openDialog(dialog)
}

/** The text of the server's answer: a report, or the reason why there is none. */
export async function readReport(address) {
  const answer = await api.fetchApi(address)
  return answer.text()
}

/** Calls a function after the node's own handler of an event, e.g. "onRemoved". */
export function after(node, event, then) {
  const before = node[event]
  node[event] = function () {
    const result = before?.apply(this, arguments)
    then.apply(this, arguments)
    return result
  }
}

/** A node's part of the outputs of all nodes. The key of a node in a subgraph begins with the subgraph's id. */
export const outputOf = ({ graph, id }, outputs) => outputs[graph?.isRootGraph ? id : `${graph?.id}:${id}`]

/** Calls a function whenever a widget is given a new value: typed, or chosen. */
export function whenSet(widget, then) {
  const before = widget.callback
  widget.callback = function () {
    const result = before?.apply(this, arguments)
    then()
    return result
  }
}

/** The same, and also when a workflow with a value is opened. */
export function whenChanged(node, widget, then) {
  whenSet(widget, then)
  after(node, "onConfigure", then)
}

/** The event that the inputs of a Train Face LoRA have changed: another LoRA will be trained. */
export const INPUTS_CHANGED = "facelora.inputs-changed"

/** Tells so, and resets `checkpoint` of the node: the chosen step belongs to another training run. */
export function inputsChanged(train) {
  const widget = widgetOf(train, "checkpoint")
  if (widget.value) {
    widget.value = 0
    widget.callback?.(0)
  }
  document.dispatchEvent(new CustomEvent(INPUTS_CHANGED, { detail: train }))
}

/** Makes the node as tall as its widgets need now. */
export function makeRoom(node) {
  const wanted = node.computeSize()[1]
  if (node.size[1] < wanted) node.setSize([node.size[0], wanted])
  node.setDirtyCanvas?.(true, true)
}
