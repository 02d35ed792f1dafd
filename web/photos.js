/** The pictures of Load Face Photos: dropped, pasted or chosen files, as thumbnails that can be removed. */

import { app } from "../../scripts/app.js"
import { api } from "../../scripts/api.js"
import {
  BASE_CHOSEN, addElement, after, baseOf, fedBy, inputsChanged, isApp, makeRoom, outputOf, remember, useOf, whenChanged, whenSet, widgetOf,
} from "./dom.js"
import { choose, make } from "./elements.js"
import { Captions } from "./captions.js"
import { DELETED, deletePhotos } from "./people.js"
import { dropped, isNoise, photoTile } from "./tiles.js"
import { forgetThumbnail, thumbnail } from "./thumbnails.js"
import { say, saySentence } from "./words.js"

const NODE = "FaceLoRALoadPhotos", TRAIN = "FaceLoRATrain"
const TILE = 76, GAP = 4, LINE = 16, LETTER = 6 // in pixels; tiles are larger where a row has room
const MASK = /-masklabel\.png$/i // The server finds it beside the photo of the same name.

const folderOf = (name) => name.split("/").slice(0, -1).join("/")
const NO_FOLDER = "(no folder)", ALL = "all photos"
const DROPPED = "photos/" // begins the names of dropped photos

/** The resolution set in Train Face LoRA for a node's photos; 0 for the base model's. */
const resolutionOf = (node) => fedBy(node, TRAIN).map((train) => widgetOf(train, "resolution").value)[0] ?? 0

/** The server's answer as JSON. Throws its error message if it refuses. */
async function ask(address, options) {
  const answer = await api.fetchApi(address, { method: "POST", ...options })
  const result = await answer.json().catch(() => ({ error: `${answer.status} ${answer.statusText}` }))
  if (result.error) throw new Error(result.error)
  return result
}

/** Uploads a photo of the person, and returns its name in the input folder. */
async function upload(file, person, folder) {
  const body = new FormData()
  for (const [name, value] of Object.entries({ person, folder, file })) body.append(name, value)
  return (await ask("/facelora/photos", { body })).name
}

class Pictures {
  constructor(node) {
    this.node = node
    this.value = widgetOf(node, "pictures")
    this.value.hidden = this.value.options.hidden = true
    this.button = make("button", "facelora-add", say("Add photos"))
    this.button.title = say("You can also drop or paste photos")
    this.clear = make("button", "facelora-remove-all", say("Remove all"))
    this.clear.addEventListener("click", () => this.removeAll())
    this.note = make("span", "facelora-quiet")
    this.headline = make("div", "facelora-headline")
    this.refused = make("div", "facelora-refused")
    this.seen = { photos: [] }
    this.ownNames = {} // the original names, by the names in the input folder
    this.tiles = make("div", "facelora-tiles")
    const accept = "image/*,.heic,.heif,.avif"
    this.chooser = Object.assign(document.createElement("input"), { type: "file", multiple: true, accept })
    this.button.addEventListener("click", () => this.chooser.click())
    this.chooser.addEventListener("change", () => this.add([...this.chooser.files]))
    this.captions = new Captions(() => this.captioned())
    this.captions.root.addEventListener("toggle", () => makeRoom(node))
    const row = make("div", "facelora-row", this.button, this.clear, this.note)
    const root = make("div", "facelora-panel", row, this.headline, this.refused, this.tiles, this.captions.root)
    this.widget = addElement(node, "thumbnails", root, () => this.height())
    // ComfyUI asks the node only about files over the canvas, and opens files dropped elsewhere as workflows.
    root.addEventListener("dragover", (event) => event.preventDefault())
    root.addEventListener("drop", (event) => this.take(event))
    node.onDragOver = (event) => [...(event.dataTransfer?.items ?? [])].some((item) => item.kind === "file")
    node.onDragDrop = (event) => this.take(event)
    node.pasteFiles = (files) => this.add([...files])
    for (const name of ["pictures", "folder", "check"]) whenChanged(node, widgetOf(node, name), () => this.changed())
    for (const name of ["pictures", "folder"]) whenSet(widgetOf(node, name), () => fedBy(node, TRAIN).forEach(inputsChanged))
    after(node, "onConnectionsChange", () => this.changed())
    after(node, "onExecuted", ({ facelora_photos: [seen] = [] }) => seen && this.report(seen))
    this.show()
  }

  get names() {
    return this.value.value.split("\n").map((name) => name.trim()).filter(Boolean)
  }

  set names(names) {
    this.value.value = names.join("\n")
    this.value.callback?.(this.value.value)
    remember(this.node)
  }

  height() {
    const width = this.node.size[0] - 30 + GAP
    const columns = Math.max(1, Math.floor(width / (TILE + GAP)))
    const lines = [this.headline, ...this.refused.children].map(({ textContent }) => Math.ceil((textContent.length * LETTER) / width))
    const text = lines.reduce((sum, count) => sum + (count && GAP + LINE * count), 0)
    const captions = this.captions.root.offsetHeight
    return 36 + text + Math.ceil((Math.ceil(this.tiles.childElementCount / columns) * width) / columns) + (captions && captions + 6)
  }

  /** Another LoRA will be trained, because a caption has changed. */
  captioned() {
    fedBy(this.node, TRAIN).forEach(inputsChanged)
    this.show()
  }

  /** Removes all photos, and also deletes the dropped ones from the input folder if the user wants that. */
  async removeAll() {
    const { names } = this, dropped = names.filter((name) => name.startsWith(DROPPED))
    const what = say("Their copies are in ComfyUI's input folder. Photos that a training run uses are kept. To use photos again, choose their folder.")
    const answer = dropped.length
      ? await choose(say("Delete the files too?"), [{ title: what, images: [], button: say("Delete the files"), answer: true }], say("Keep the files"))
      : null
    if (answer === undefined) return
    this.refused.replaceChildren()
    this.names = []
    if (answer) await deletePhotos(dropped)
  }

  /** Checks the node's photos once nothing has changed for a moment. */
  changed() {
    this.asked = undefined // an answer on its way is about other photos
    this.seen = { photos: this.seen.photos.filter(({ name }) => this.names.includes(name)) }
    this.show()
    clearTimeout(this.soon)
    this.soon = setTimeout(() => this.check(), 300)
  }

  async check() {
    const [folder, check] = ["folder", "check"].map((name) => widgetOf(this.node, name).value), use = useOf(this.node)
    if (!check || use === "class_photos" || (!this.names.length && folder === NO_FOLDER)) return
    const asked = (this.asked = { folder, pictures: this.value.value, base: baseOf(this.node), resolution: resolutionOf(this.node), use })
    this.note.textContent = say("checking")
    const seen = await ask("/facelora/check", { body: JSON.stringify(asked) })
      .catch(({ message }) => ({ photos: [], headline: message, verdict: "rejected" }))
    if (asked === this.asked) this.report(seen)
  }

  /** Shows the result: a verdict and its reason for each photo, also in the folder, and one headline. */
  report(seen) {
    this.asked = undefined
    this.seen = seen
    Object.assign(this.ownNames, seen.own_names)
    Object.assign(this.captions.all, seen.captions)
    this.show()
  }

  /** Adds dropped files once, however many elements get the event. */
  async take(event) {
    event.preventDefault()
    if (!event.isTaken) {
      event.isTaken = true
      this.add(await dropped(event.dataTransfer))
    }
    return true
  }

  /** Uploads the files, and shows why a file is refused. */
  async add(files) {
    const wanted = files.filter((file) => !isNoise(file))
    const [train] = fedBy(this.node, TRAIN)
    const person = train ? widgetOf(train, "name").value : ""
    this.refused.replaceChildren()
    let folder = folderOf(this.names.at(-1) ?? "")
    for (const [index, file] of wanted.entries()) {
      this.note.textContent = say("uploading {} of {}", index + 1, wanted.length)
      try {
        const name = await upload(file, person, folder)
        folder = folderOf(name)
        if (!this.names.includes(name)) forgetThumbnail(name)
        this.ownNames[name] = file.name
        if (this.names.includes(name)) this.refused.append(make("div", "facelora-quiet", say("{} was already added", file.name)))
        else if (!MASK.test(name)) this.names = [...this.names, name]
      } catch (error) {
        this.refused.append(make("div", "", `✕ ${error.message}`))
      }
    }
    this.chooser.value = ""
    const folders = widgetOf(this.node, "folder").options.values
    if (folder && !folders.includes(folder)) folders.push(folder)
    this.show()
  }

  /** Whether Run may continue. If the photos show different people, the user is asked first. */
  async agreed() {
    const asks = (train) => train.mode === LiteGraph.ALWAYS && widgetOf(train, "use").value !== ALL // not muted or bypassed
    const trains = fedBy(this.node, TRAIN).filter(asks)
    if (!this.seen.mixed || !trains.length) return true
    const answer = await choose(say("These photos show different people"), this.people(), say("Train on all photos"))
    if (answer === undefined) return false
    if (answer) this.names = this.names.filter((name) => answer.has(name))
    else for (const train of trains) widgetOf(train, "use").value = ALL
    return true
  }

  /** A row of pictures with a button for each person whose photos can be kept. */
  people() {
    const numbers = [...new Set(this.seen.photos.map(({ person }) => person))].filter(Boolean).sort()
    return numbers.map((number) => {
      const names = this.seen.photos.filter(({ person }) => person === number).map(({ name }) => name)
      const images = names.map((name) => {
        const image = Object.assign(make("img", ""), { alt: "" })
        thumbnail(name).then((address) => (image.src = address))
        return image
      })
      const can = names.every((name) => this.names.includes(name)) // photos in a folder can't be removed here
      return { title: say("person {}", number), images, button: can && say("Keep only these"), answer: new Set(names) }
    })
  }

  show() {
    const { names, seen } = this
    this.note.textContent = names.length ? say("{} added", names.length) : say("or drop them here")
    this.clear.hidden = !names.length
    this.headline.textContent = saySentence(seen.headline) ?? ""
    this.headline.className = `facelora-headline facelora-says-${seen.verdict ?? "nothing"}`
    const reports = new Map(seen.photos.map((photo) => [photo.name, photo]))
    const { value: folder } = widgetOf(this.node, "folder")
    const others = [...reports.keys()].filter((name) => !names.includes(name) && name.startsWith(`${folder}/`))
    const tiles = (some, removable) => some.map((name) => this.tile(name, reports.get(name), removable))
    this.tiles.replaceChildren(...tiles(names, true), ...tiles(others, false))
    this.captions.show([...names, ...others], useOf(this.node) === "photos" ? fedBy(this.node, TRAIN)[0] : undefined)
    makeRoom(this.node)
  }

  tile(name, photo, removable) {
    const own = this.ownNames[name] ?? name.split("/").at(-1)
    const remove = () => {
      this.names = this.names.filter((other) => other !== name)
      if (name.startsWith(DROPPED)) deletePhotos([name])
    }
    return photoTile(thumbnail(name), own, photo, removable && remove, this.captions.all[name])
  }
}

const panels = new Set()
const checkAll = () => panels.forEach((shown) => shown.changed())
document.addEventListener(BASE_CHOSEN, checkAll)

app.registerExtension({
  name: "facelora.photos",
  nodeCreated(node) {
    if (node.comfyClass === TRAIN) whenSet(widgetOf(node, "resolution"), checkAll)
    if (node.comfyClass !== NODE) return
    const shown = new Pictures(node)
    panels.add(shown)
    after(node, "onRemoved", () => panels.delete(shown))
  },
  /** The outputs of a workflow that is shown again. */
  onNodeOutputsUpdated(outputs) {
    for (const shown of panels) {
      const [seen] = outputOf(shown.node, outputs)?.facelora_photos ?? []
      if (seen) shown.report(seen)
    }
  },
})

document.addEventListener(DELETED, ({ detail }) => {
  const gone = new Set(detail.map((file) => file.replace(/^input\//, "")))
  gone.forEach(forgetThumbnail)
  for (const shown of panels) {
    for (const name of gone) delete shown.captions.all[name] // another photo may get its name
    if (shown.names.some((name) => gone.has(name))) shown.names = shown.names.filter((name) => !gone.has(name))
  }
})

// Files dropped anywhere on an app's page are added to its photos, except workflows.
document.body.addEventListener("drop", (event) => {
  const [shown, ...others] = panels
  const { files } = event.dataTransfer
  if (isApp() && shown && !others.length && files.length && ![...files].some(({ name }) => name.endsWith(".json"))) shown.take(event)
  if (event.isTaken) event.stopPropagation()
})

/** Run asks first if the photos of a training run show different people. */
const queue = app.queuePrompt
app.queuePrompt = async function () {
  for (const shown of panels) if (!(await shown.agreed())) return false
  return queue.apply(this, arguments)
}
