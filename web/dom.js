/** What the widgets of the nodes share: elements, the style sheet, small talk with ComfyUI. */

import { app } from "../../scripts/app.js"
import { api } from "../../scripts/api.js"
import { say } from "./words.js"

document.head.append(Object.assign(document.createElement("link"), {
  rel: "stylesheet", href: new URL("./facelora.css", import.meta.url).href,
}))

export function make(name, className, ...children) {
  const made = document.createElement(name)
  made.className = className
  made.append(...children)
  return made
}

const MARGIN = 4
/** What stands above an element in ComfyUI's app mode. */
const LABELS = { training: "Progress", thumbnails: "Photos", picker: "Styles" }

/** Adds an element to a node that is no part of what is saved or queued. `height` says how many pixels it wants now. */
export function addElement(node, name, element, height) {
  const room = () => height() + 2 * MARGIN
  const widget = node.addDOMWidget(name, `facelora_${name}`, element, {
    serialize: false, hideOnZoom: false, hideInPanel: true, margin: MARGIN, getMinHeight: room, getMaxHeight: room,
  })
  widget.serialize = false
  if (LABELS[name]) widget.label = say(LABELS[name])
  return widget
}

export const widgetOf = (node, name) => node.widgets.find((widget) => widget.name === name)

/** Shows an element in the middle of the page, until the next click or key; a text, which can be copied, until one beside it. */
export function showLarge(element) {
  const dialog = make("dialog", "facelora-large", element)
  const isText = element.tagName === "PRE"
  dialog.addEventListener("click", ({ target }) => isText && target === element || dialog.close())
  dialog.addEventListener("keydown", () => isText || dialog.close()) // Escape closes every dialog
  dialog.addEventListener("close", () => dialog.remove())
  document.body.append(dialog)
  dialog.showModal()
}

/** The text with which the server answers: a report, or the sentence that says why there is none. */
export async function readReport(address) {
  const answer = await api.fetchApi(address)
  return answer.text()
}

/** Calls a function after whatever the node does when something is done to it, e.g. "onRemoved". */
export function after(node, event, then) {
  const before = node[event]
  node[event] = function () {
    const result = before?.apply(this, arguments)
    then.apply(this, arguments)
    return result
  }
}

/** Calls a function whenever a widget has a new value: typed, chosen, or from a workflow that was opened. */
export function whenChanged(node, widget, then) {
  const before = widget.callback
  widget.callback = function () {
    const result = before?.apply(this, arguments)
    then()
    return result
  }
  after(node, "onConfigure", then)
}

/** Makes the node as tall as its widgets need now. */
export function makeRoom(node) {
  const wanted = node.computeSize()[1]
  if (node.size[1] < wanted) node.setSize([node.size[0], wanted])
  node.setDirtyCanvas?.(true, true)
}

export function complain(summary, detail) {
  app.extensionManager.toast.add({ severity: "error", summary, detail, life: 8000 })
}
