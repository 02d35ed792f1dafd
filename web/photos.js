/** The pictures of Load Face Photos: dropped, pasted or chosen files, as thumbnails that can be taken out again. */

import { app } from "../../scripts/app.js"
import { api } from "../../scripts/api.js"
import { addElement, after, complain, make, makeRoom, whenChanged, widgetOf } from "./dom.js"
import { say } from "./words.js"

const NODE = "FaceLoRALoadPhotos"
const TILE = 54, GAP = 4, LINE = 16, LETTER = 6 // in pixels; tiles are larger where a row has room
const MASK = /-masklabel\.png$/i // of the photo of the same name, which the server finds beside it
const NUMBER = /\/photo (\d+)[^/]*$/
const HEIC = /\.(heic|heif|avif)$/i // for which some browsers know no type

const isPicture = (file) => file.type.startsWith("image/") || HEIC.test(file.name)

/** The file of something that was dropped, or the files of a folder. */
async function filesOf(entry) {
  if (entry.isFile) return [await new Promise((done, failed) => entry.file(done, failed))]
  const reader = entry.createReader(), inside = []
  for (let more = [null]; more.length; inside.push(...more))
    more = await new Promise((done, failed) => reader.readEntries(done, failed))
  return (await Promise.all(inside.map(filesOf))).flat()
}

/** All files that were dropped. The entries are there only until the event is over. */
async function dropped({ items, files }) {
  const entries = [...items].map((item) => item.webkitGetAsEntry?.()).filter(Boolean)
  return entries.some((entry) => entry.isDirectory) ? (await Promise.all(entries.map(filesOf))).flat() : [...files]
}

/** A folder below the input folder that no other photos are in: "photos/2026-11-26 13.05.59.123", in UTC. */
const newFolder = () => `photos/${new Date().toISOString().slice(0, 23).replace("T", " ").replaceAll(":", ".")}`

const folderOf = (name) => name.split("/").slice(0, -1).join("/")

/** The name in the input folder of a file uploaded under a name; the server gives another if that is taken by other content. */
async function upload(file, folder, as) {
  const body = new FormData()
  body.append("image", file, as)
  body.append("subfolder", folder)
  const answer = await api.fetchApi("/upload/image", { method: "POST", body })
  if (!answer.ok) throw new Error(`${file.name}: ${answer.status} ${answer.statusText}`)
  const { name, subfolder } = await answer.json()
  return subfolder ? `${subfolder}/${name}` : name
}

class Pictures {
  constructor(node) {
    this.node = node
    this.value = widgetOf(node, "pictures")
    this.value.hidden = this.value.options.hidden = true
    this.button = make("button", "facelora-add", say("Add photos"))
    this.button.title = say("Or drop them onto the node, or paste them")
    this.clear = make("button", "facelora-remove-all", say("Remove all"))
    this.clear.title = say("The files stay in ComfyUI's input folder, where folder offers them")
    this.clear.addEventListener("click", () => (this.names = []))
    this.note = make("span", "facelora-quiet")
    this.headline = make("div", "facelora-headline")
    this.reports = []
    this.numbers = new Map() // of photos by their names without endings
    this.originals = new Map() // the files' own names, by those in the input folder
    this.tiles = make("div", "facelora-tiles")
    const accept = "image/*,.heic,.heif,.avif"
    this.chooser = Object.assign(document.createElement("input"), { type: "file", multiple: true, accept })
    this.button.addEventListener("click", () => this.chooser.click())
    this.chooser.addEventListener("change", () => this.add([...this.chooser.files]))
    const row = make("div", "facelora-row", this.button, this.clear, this.note)
    const root = make("div", "facelora-panel", row, this.headline, this.tiles)
    this.widget = addElement(node, "thumbnails", root, () => this.height())
    // ComfyUI asks the node about what is over the canvas alone, and opens what is dropped elsewhere as a workflow.
    root.addEventListener("dragover", (event) => event.preventDefault())
    root.addEventListener("drop", async (event) => {
      event.preventDefault()
      event.stopPropagation()
      this.add(await dropped(event.dataTransfer))
    })
    node.onDragOver = (event) => [...(event.dataTransfer?.items ?? [])].some((item) => item.kind === "file")
    node.onDragDrop = async (event) => this.add(await dropped(event.dataTransfer))
    node.pasteFiles = (files) => this.add([...files])
    whenChanged(node, this.value, () => this.show())
    after(node, "onExecuted", (output) => this.report(output))
    this.show()
  }

  get names() {
    return this.value.value.split("\n").map((name) => name.trim()).filter(Boolean)
  }

  set names(names) {
    this.value.value = names.join("\n")
    this.headline.textContent = "" // it was on other photos
    this.show()
    this.node.graph?.change?.()
  }

  /** A name that does not say the file's own: ComfyUI writes the graph, and so these names, into pictures that it saves. */
  nameFor(file) {
    const [, stem, ending] = /^(.*?)(-masklabel\.png|\.[^.]*)?$/i.exec(file.name)
    const last = Math.max(0, ...this.numbers.values(), ...this.names.map((name) => NUMBER.exec(name)?.[1] ?? 0))
    if (!this.numbers.has(stem)) this.numbers.set(stem, last + 1)
    return `photo ${String(this.numbers.get(stem)).padStart(2, "0")}${ending ?? ""}`
  }

  height() {
    const width = this.node.size[0] - 30 + GAP
    const columns = Math.max(1, Math.floor(width / (TILE + GAP)))
    const letters = this.headline.textContent.length
    const headline = letters ? GAP + LINE * Math.ceil((letters * LETTER) / width) : 0
    return 36 + headline + Math.ceil((Math.ceil(this.tiles.childElementCount / columns) * width) / columns)
  }

  /** Shows what a run has found: a verdict and its reason for each photo, and those of the folder too. */
  report({ facelora_photos = [], facelora_headline = [] } = {}) {
    this.reports = facelora_photos
    this.headline.textContent = facelora_headline[0] ?? ""
    this.show()
  }

  /** Uploads what is a picture among the files; true if anything was. */
  async add(files) {
    const pictures = files.filter(isPicture)
    const folder = folderOf(this.names.at(-1) ?? "") || newFolder()
    for (const [index, file] of pictures.entries()) {
      this.note.textContent = say("uploading {} of {}", index + 1, pictures.length)
      try {
        const name = await upload(file, folder, this.nameFor(file))
        this.originals.set(name, file.name)
        if (!MASK.test(name) && !this.names.includes(name)) this.names = [...this.names, name]
      } catch (error) {
        complain(say("The photo was not uploaded"), error.message)
      }
    }
    this.chooser.value = ""
    const folders = widgetOf(this.node, "folder").options.values
    if (this.names.some((name) => folderOf(name) === folder) && !folders.includes(folder)) folders.push(folder)
    this.show()
    return pictures.length > 0
  }

  show() {
    const { names } = this
    this.note.textContent = names.length ? say("{} added", names.length) : say("or drop them here")
    this.clear.hidden = !names.length
    const reports = new Map(this.reports.map((report) => [report.name, report]))
    const { value: folder } = widgetOf(this.node, "folder")
    const others = [...reports.keys()].filter((name) => !names.includes(name) && name.startsWith(`${folder}/`))
    const tiles = (some, removable) => some.map((name) => this.tile(name, reports.get(name), removable))
    this.tiles.replaceChildren(...tiles(names, true), ...tiles(others, false))
    makeRoom(this.node)
  }

  tile(name, report, removable) {
    const src = api.apiURL(`/facelora/photo?name=${encodeURIComponent(name)}`)
    const image = Object.assign(make("img", ""), { src, alt: name })
    const remove = make("button", "", "×")
    const original = this.originals.get(name) ?? name
    remove.title = say("Take out {}", original)
    remove.addEventListener("click", () => (this.names = this.names.filter((other) => other !== name)))
    const tile = make("div", `facelora-tile facelora-${report?.verdict ?? "unknown"}`, image)
    if (removable) tile.append(remove)
    tile.title = [original, report?.reason].filter(Boolean).join("\n")
    return tile
  }
}

const panels = new Set()

app.registerExtension({
  name: "facelora.photos",
  nodeCreated(node) {
    if (node.comfyClass !== NODE) return
    const shown = new Pictures(node)
    panels.add(shown)
    after(node, "onRemoved", () => panels.delete(shown))
  },
  /** The outputs of a workflow that is shown again. */
  onNodeOutputsUpdated(outputs) {
    for (const shown of panels) shown.report(outputs[shown.node.id])
  },
})
