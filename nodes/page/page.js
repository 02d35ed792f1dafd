/** The local page: the next person's photos and settings, and everyone who was trained. The server has all that is shown. */

import { choose, enlargeable, make, openDialog } from "./web/elements.js"
import { DONE, ENDED, FAILED, STOPPED, WAITING, doneShare, drawCurves, spanText, statusText, svg, timeText } from "./web/progress.js"
import { dropped, headshotTile, isNoise, moreLike, photoTile } from "./web/tiles.js"
import { say, sayName, saySentence, speakChinese } from "./web/words.js"

const LANGUAGE = "facelora.language"
const language = localStorage.getItem(LANGUAGE) ?? (navigator.language.startsWith("zh") ? "zh" : "en")
speakChinese(() => language === "zh")
document.documentElement.lang = language
// In another program's tab, its colours.
if (frameElement) document.documentElement.style.colorScheme = parent.document.body.classList.contains("dark") ? "dark" : "light"
const [header, nav, section] = ["header", "nav", "section"].map((name) => document.querySelector(name))
const RECIPES = ["fast", "balanced", "best"], MINUTE = 60
// say
const PHASES = { starting: "starting", running: "training", waiting: "waiting", stopped: "stopped", failed: "failed", done: "done" }

/** The server's answer. Throws its message if it refuses. */
async function ask(address, method = "GET", body) {
  const isFile = body instanceof Blob
  const headers = body && !isFile ? { "Content-Type": "application/json" } : {}
  let answer
  try {
    answer = await fetch(address, { method, headers, body: isFile ? body : body && JSON.stringify(body) })
  } catch {
    throw new Error(say("The page's program has ended. Start it again"))
  }
  const result = await answer.json().catch(() => ({ error: `${answer.status} ${answer.statusText}` }))
  if (result?.error && !answer.ok) throw new Error(result.error)
  return result
}

const of = (name, ...more) => ["people", name, ...more].map((part) => part.split("/").map(encodeURIComponent).join("/")).join("/")

function button(text, done, className = "") {
  const made = Object.assign(make("button", className, text), { type: "button" })
  made.addEventListener("click", async () => {
    made.disabled = true
    await attempt(done)
    made.disabled = false
  })
  return made
}

const problem = Object.assign(make("div", "facelora-refused"), { role: "alert" })

/** Calls a function and shows why it was refused. */
async function attempt(done) {
  problem.textContent = ""
  try {
    await done()
  } catch ({ message }) {
    problem.textContent = message
    problem.scrollIntoView({ block: "nearest" })
  }
}

function field(text, input, value) {
  if (value !== undefined) input.value = value
  return make("label", "", make("span", "", text), input)
}

const input = (properties) => Object.assign(make("input", ""), { autocomplete: "off", ...properties })
const option = (value, text = value) => Object.assign(make("option", "", text), { value })

/** Replaces what an element shows of a value, if the value has changed: what stays keeps the keyboard's focus. */
function fill(element, value, made) {
  const key = JSON.stringify(value ?? null)
  if (element.shown === key) return
  element.shown = key
  element.replaceChildren(...made(value))
}

function fieldset(title, ...children) {
  return make("fieldset", "", make("legend", "", title), ...children)
}

/** A style pack and its styles as pictures to choose from. No chosen style means all of them. */
class Styles {
  constructor(packs, usual) {
    this.packs = packs
    this.chosen = new Set()
    this.pack = make("select", "", ...(usual ? [option("", usual)] : []), ...Object.keys(packs).map((name) => option(name, sayName(name))))
    this.grid = make("div", "facelora-styles")
    this.pack.addEventListener("change", () => this.show())
    this.show()
  }

  show() {
    this.chosen.clear()
    this.grid.replaceChildren(...(this.packs[this.pack.value] ?? []).map((style) => {
      const src = `style?${new URLSearchParams({ pack: this.pack.value, style })}`
      const card = Object.assign(make("button", "facelora-style", Object.assign(make("img", ""), { src, alt: "" }), make("span", "", sayName(style))), { type: "button" })
      card.setAttribute("aria-pressed", false)
      card.addEventListener("click", () => {
        this.chosen.delete(style) || this.chosen.add(style)
        card.setAttribute("aria-pressed", this.chosen.has(style))
      })
      return card
    }))
  }
}

/** The form for the next person. */
class Setup {
  constructor() {
    this.names = []
    this.chooser = input({ type: "file", multiple: true, accept: "image/*,.heic,.heif,.avif", hidden: true })
    this.chooser.addEventListener("change", () => this.add([...this.chooser.files]))
    this.headline = Object.assign(make("div", "facelora-headline"), { role: "status" })
    this.refused = make("div", "facelora-refused")
    this.tiles = make("div", "facelora-tiles")
    this.note = make("span", "facelora-quiet", say("or drop them here"))
    this.drop = make("div", "drop", make("div", "facelora-row", button(say("Add photos"), () => this.chooser.click()), this.note), this.chooser, this.headline, this.refused, this.tiles)
    this.name = input({ required: true, maxLength: 100 })
    this.kind = input({ required: true, value: "person" })
    this.kind.setAttribute("list", "kinds")
    const kinds = Object.assign(make("datalist", "", ...["person", "woman", "man"].map((kind) => option(kind))), { id: "kinds" })
    this.base = make("select", "")
    this.base.addEventListener("change", () => this.changed())
    this.lacks = make("div", "facelora-line facelora-warning")
    this.folders = Object.assign(make("textarea", ""), { rows: 3 })
    this.named = make("details", "", make("summary", "", say("Folders with base models")), field(say("One folder in each line"), this.folders),
      button(say("Look in these folders"), async () => this.offer(await ask("folders", "PUT", { folders: this.folders.value.split("\n") }))))
    this.recipes = Object.fromEntries(RECIPES.map((recipe) => [recipe, input({ type: "radio", name: "recipe", value: recipe, checked: recipe === "balanced" })]))
    this.spans = Object.fromEntries(RECIPES.map((recipe) => [recipe, make("span", "facelora-quiet")]))
    const choices = RECIPES.map((recipe) => make("label", "line", this.recipes[recipe], make("span", "", sayName(recipe)), this.spans[recipe]))
    this.memory = make("div", "facelora-quiet")
    this.count = input({ type: "number", min: 1, max: 1000, value: 20, required: true })
    this.steps = input({ type: "number", min: 1, max: 100000, placeholder: say("as the recipe") })
    for (const one of [this.count, this.steps]) one.addEventListener("change", () => this.foresee())
    this.more = make("div", "part")
    const more = make("details", "", make("summary", "", say("More")), this.more)
    this.agreed = input({ type: "checkbox", required: true })
    this.consent = { agreed_by: input({ maxLength: 200 }), agreed_for: input({ maxLength: 1000 }), agreed_until: input({ type: "date" }) }
    const { agreed_by: who, agreed_for: what, agreed_until: until } = this.consent
    const written = make("details", "", make("summary", "", say("Note of consent")),
      make("div", "facelora-row", field(say("Who has agreed"), who), field(say("What for"), what), field(say("Until, ten years at most"), until)))
    const start = Object.assign(make("button", "action", say("Start")), { type: "submit" })
    this.root = make("form", "", make("h2", "", say("New person")), fieldset(say("10 to 20 photos"), this.drop),
      make("div", "facelora-row", field(say("Name"), this.name), field(say("Class word, e.g. woman"), this.kind), kinds),
      make("div", "part", field(say("Base model"), this.base), this.lacks, this.named),
      fieldset(say("Recipe"), make("div", "facelora-row", ...choices), this.memory), more,
      make("label", "line", this.agreed, make("span", "", say("This person has agreed to it"))), written,
      make("div", "facelora-row", start))
    this.root.addEventListener("submit", (event) => {
      event.preventDefault()
      attempt(() => this.start())
    })
    for (const name of ["dragover", "dragleave"])
      this.drop.addEventListener(name, (event) => {
        event.preventDefault()
        this.drop.classList.toggle("over", name === "dragover")
      })
    document.addEventListener("dragover", (event) => event.preventDefault())
    document.addEventListener("drop", async (event) => {
      event.preventDefault()
      this.drop.classList.remove("over")
      if (this.root.isConnected) this.add(await dropped(event.dataTransfer))
    })
    document.addEventListener("paste", ({ clipboardData: { files } }) => this.root.isConnected && files.length && this.add([...files]))
  }

  /** Shows what can be chosen. */
  offer(setup) {
    this.setup = setup
    const chosen = this.base.value || setup.chosen
    this.base.replaceChildren(...setup.bases.map(({ base, title, family }) => option(base, base === setup.demo ? say("The demo's small model, for a first try") : `${title} · ${family}`)))
    if (setup.bases.some(({ base }) => base === chosen)) this.base.value = chosen
    this.named.hidden = !setup.folders
    this.folders.value = (setup.folders ?? []).join("\n")
    this.styles = new Styles(setup.packs, say("the usual one"))
    this.more.replaceChildren(make("div", "facelora-row", field(say("Style pack"), this.styles.pack), field(say("How many headshots"), this.count), field(say("Steps"), this.steps)))
    this.changed()
  }

  async add(files) {
    const wanted = files.filter((file) => !isNoise(file))
    this.refused.replaceChildren()
    for (const [index, file] of wanted.entries()) {
      this.note.textContent = say("uploading {} of {}", index + 1, wanted.length)
      try {
        await ask(`photos/${encodeURIComponent(file.name)}`, "PUT", file)
      } catch ({ message }) {
        this.refused.append(make("div", "", `✕ ${message}`))
      }
    }
    this.chooser.value = ""
    await refresh()
  }

  /** Shows the photos that the server has. */
  show(names) {
    if (String(names) === String(this.names)) return
    this.names = names
    this.note.textContent = names.length ? say("{} added", names.length) : say("or drop them here")
    this.tile([])
    this.changed()
  }

  tile(photos) {
    const reports = new Map(photos.map((photo) => [photo.name, photo]))
    this.tiles.replaceChildren(...this.names.map((name) => {
      const address = `photos/${encodeURIComponent(name)}`
      const remove = () => attempt(async () => {
        await ask(address, "DELETE")
        await refresh()
      })
      const tile = photoTile(Promise.resolve(address), name, reports.get(name), remove)
      Object.assign(tile.querySelector("button"), { type: "button", ariaLabel: say("Remove {}", name) })
      return tile
    }))
  }

  /** Checks the photos for the base model, and shows how long training takes. */
  async changed() {
    if (!this.setup) return
    this.lacks.textContent = this.setup.bases.find(({ base }) => base === this.base.value)?.lacks ?? ""
    const asked = (this.asked = {}), names = this.names
    this.headline.textContent = names.length ? say("checking") : ""
    if (names.length) {
      const seen = await ask(`check?${new URLSearchParams({ base: this.base.value })}`).catch(({ message }) => ({ photos: [], headline: message, verdict: "rejected" }))
      if (asked !== this.asked) return
      this.headline.textContent = saySentence(seen.headline)
      this.headline.className = `facelora-headline facelora-says-${seen.verdict}`
      this.tile(seen.photos)
    }
    await this.foresee()
  }

  async foresee() {
    const query = { base: this.base.value, photos: this.names.length, pictures: this.count.value, steps: this.steps.value }
    const asked = (this.foreseen = String(new URLSearchParams(query)))
    const { spans = {}, memory } = (await ask(`forecast?${asked}`).catch(() => ({}))) ?? {}
    if (asked !== this.foreseen) return
    for (const recipe of RECIPES) this.spans[recipe].textContent = spans[recipe] ? spanText(spans[recipe]) : ""
    this.memory.textContent = memory ? say("{} GiB of memory", (memory / 2 ** 30).toFixed(1)) : say("How long it takes on this machine is not known")
  }

  async start() {
    const name = this.name.value.trim(), { value: recipe } = Object.values(this.recipes).find(({ checked }) => checked)
    await ask("people", "POST", {
      name, base: this.base.value, agreed: this.agreed.checked, class_word: this.kind.value.trim(), recipe,
      style_pack: this.styles.pack.value, count: Number(this.count.value), steps: Number(this.steps.value),
      ...Object.fromEntries(Object.entries(this.consent).map(([key, { value }]) => [key, value])),
    })
    for (const one of Object.values(this.consent)) one.value = ""
    this.name.value = ""
    this.agreed.checked = false
    location.hash = encodeURIComponent(name)
    await refresh()
  }
}

/** A trained person: progress, headshots, and what can be done with them. */
class Person {
  constructor(name, setup) {
    this.name = name
    const act = (...parts) => async () => {
      await ask(of(name, ...parts), "POST", {})
      await refresh()
    }
    this.status = Object.assign(make("div", "facelora-status"), { role: "status" })
    this.time = make("span", "facelora-time facelora-quiet")
    this.bar = make("div", "")
    this.cancel = button(say("Cancel"), act("stop"))
    this.goOn = button(say("Continue"), act("continue"), "action")
    this.progress = make("div", "facelora-row", make("div", "facelora-bar", this.bar), this.time)
    this.warning = make("div", "facelora-line facelora-warning")
    this.loss = make("div", "", svg())
    this.likeness = make("div", "", svg())
    this.samples = make("div", "samples")
    this.shots = make("div", "facelora-headshots")
    this.drawing = Object.assign(make("div", "facelora-line facelora-quiet"), { role: "status" })
    this.only = input({ type: "checkbox" })
    this.only.addEventListener("change", () => this.show(this.state))
    const link = (text, ...parts) => Object.assign(make("a", "", text), { href: of(name, ...parts), download: "" })
    this.filter = make("div", "facelora-row", make("label", "line", this.only, make("span", "", say("Only favourites"))), link(say("Download the headshots"), "zip"), link(say("Download the LoRA"), "lora"))
    this.styles = new Styles(setup.packs)
    this.count = input({ type: "number", min: 1, max: 100, value: 8 })
    const draw = button(say("Draw"), async () => {
      await ask(of(name, "draw"), "POST", { pack: this.styles.pack.value, styles: [...this.styles.chosen], count: Number(this.count.value) })
      await refresh()
    })
    this.title = input({ maxLength: 100 })
    this.agreed = input({ type: "checkbox" })
    this.published = Object.assign(make("div", "facelora-line"), { role: "status" })
    const publish = button(say("Make a folder to upload"), async () => {
      const { folder } = await ask(of(name, "publish"), "POST", { title: this.title.value, agreed: this.agreed.checked })
      this.published.textContent = folder
    })
    const part = (text, ...children) => make("details", "", make("summary", "", text), make("div", "part", ...children))
    this.after = make("div", "part",
      part(say("More headshots"), make("div", "facelora-row", field(say("Style pack"), this.styles.pack), field(say("How many headshots"), this.count), draw), this.styles.grid),
      part(say("Publish"), make("div", "facelora-quiet", say("The favourites are its pictures. Personal data are removed.")), field(say("Title"), this.title),
        make("label", "line", this.agreed, make("span", "", say("This person has agreed to be published"))), make("div", "facelora-row", publish), this.published))
    this.rename = button(say("Rename"), () => this.renamed())
    this.remove = button(say("Delete"), () => this.deleted())
    this.headshots = make("div", "part", make("h3", "", say("Headshots")), this.filter, this.drawing, this.shots)
    this.root = make("div", "part", make("div", "facelora-row", make("h2", "", name), this.rename, this.remove),
      make("div", "facelora-row", this.status, this.cancel, this.goOn), this.progress, this.warning,
      this.headshots, make("div", "charts", this.loss, this.likeness), this.samples, this.after)
  }

  show(state) {
    this.state = state
    const { phase, active, drawing } = state, isDrawing = active && ENDED.has(phase)
    const text = phase === STOPPED ? say("Stopped. Continue takes up where it was.") : phase === DONE && !state.file ? say("done") : statusText(state)
    const advice = phase === DONE && state.advice ? state.advice : ""
    if (this.status.textContent !== text) this.status.textContent = text
    this.status.className = `facelora-status ${phase === FAILED ? "facelora-says-rejected" : ""}`
    this.time.textContent = active && !isDrawing ? timeText(state) : ""
    this.bar.style.width = `${100 * (phase === WAITING ? 0 : doneShare(state))}%`
    this.progress.hidden = !active || isDrawing
    this.cancel.hidden = !active
    this.goOn.hidden = active || phase === DONE
    this.rename.disabled = this.remove.disabled = active
    this.warning.textContent = advice || state.warning || ""
    drawCurves(state, this.loss, this.likeness)
    fill(this.samples, state.samples, (names = []) => names.map((name) => picture(of(this.name, "samples", name), say("samples"))))
    const shown = state.headshots.filter(({ favourite }) => favourite || !this.only.checked)
    fill(this.shots, [shown, active], () => shown.map((shot) => this.shot(shot, active)))
    this.headshots.hidden = !state.headshots.length
    this.after.hidden = !state.file
    this.drawing.textContent = isDrawing ? (drawing.phase === WAITING ? say("waiting, runs ahead in the queue: {}", drawing.ahead) : say("drawing headshots")) : drawing.phase === FAILED ? say("failed: {}", drawing.error) : ""
  }

  shot({ file, likeness, style, favourite }, active) {
    const address = of(this.name, "headshots", file)
    const star = Object.assign(make("button", "", favourite ? "★" : "☆"), { type: "button", title: say("Favourite"), ariaLabel: say("Favourite") })
    star.setAttribute("aria-pressed", favourite)
    star.addEventListener("click", () => attempt(async () => {
      await ask(address, "PUT", { favourite: !favourite })
      await refresh()
      ;[...this.shots.children].find((one) => one.dataset.file === file)?.querySelector("button").focus()
    }))
    const alike = moreLike(() => attempt(async () => {
      await ask(of(this.name, "draw"), "POST", { like: file })
      await refresh()
    }))
    alike.disabled = active
    const tile = headshotTile(address, sayName(style || file), likeness, this.state.limits, [star, alike])
    tile.dataset.file = file
    return tile
  }

  async renamed() {
    const name = input({ value: this.name, autofocus: true, ariaLabel: say("Name") })
    if ((await choose(say("Rename {}", this.name), [{ title: "", images: [name] }], say("Rename"))) === undefined) return
    const to = name.value.trim()
    await ask(of(this.name), "PATCH", { name: to })
    location.hash = encodeURIComponent(to)
    await refresh()
  }

  async deleted() {
    const what = say("This deletes the photos, the LoRA and all headshots of this person.")
    if ((await choose(say("Delete {}?", this.name), [{ title: what, images: [] }], say("Delete"))) === undefined) return
    await ask(of(this.name), "DELETE")
    location.hash = "new"
    await refresh()
  }
}

const picture = (src, alt) => enlargeable(Object.assign(make("img", ""), { src, alt, loading: "lazy" }))

/** An entry of the list of people. */
function entry({ name, phase, active, picture: file, likeness }, current) {
  const word = active ? (phase === WAITING ? PHASES.waiting : PHASES.running) : PHASES[phase] ?? PHASES.stopped
  const facts = [say(word), likeness == null ? "" : say("likeness {}", likeness.toFixed(2))].filter(Boolean).join(" · ")
  const image = file ? [Object.assign(make("img", ""), { src: of(name, "headshots", file), alt: "" })] : []
  const made = make("button", "", ...image, make("span", "", name, make("small", "", facts)))
  made.setAttribute("aria-current", current === name)
  made.addEventListener("click", () => (location.hash = encodeURIComponent(name)))
  return made
}

const setupForm = new Setup()
let shown // the Person on the page

/** The name in the address; without one, a person who is being trained, or was. */
function wanted(people) {
  const named = decodeURIComponent(location.hash.slice(1))
  if (named) return people.find(({ name }) => name === named)?.name
  return (people.find(({ active }) => active) ?? people.find(({ name }) => name === shown?.name))?.name
}

async function refresh() {
  const asked = decodeURIComponent(location.hash.slice(1)) || shown?.name || ""
  const { people, person, photos } = await ask(`now?${new URLSearchParams({ person: asked })}`)
  const name = wanted(people)
  fill(nav, [people, name], () => {
    const fresh = button(say("New person"), () => (location.hash = "new"), "action")
    return [fresh, ...people.map((one) => entry(one, name))]
  })
  if (!name) {
    shown = undefined
    if (!setupForm.root.isConnected) {
      section.replaceChildren(problem, setupForm.root)
      setupForm.foresee()
    }
    setupForm.show(photos)
    return
  }
  if (shown?.name !== name) {
    shown = new Person(name, setupForm.setup)
    section.replaceChildren(problem, shown.root)
    shown.root.hidden = true
  }
  if (person?.name !== name) return refreshSoon() // the first answer was about nobody
  shown.root.hidden = false
  shown.show(person)
}

const refreshSoon = () => setTimeout(() => attempt(refresh), 0)

const machine = button(say("This machine"), async () => {
  const { text } = await ask("machine"), close = make("button", "", say("Close"))
  const dialog = make("dialog", "facelora-dialog facelora-panel facelora-text", make("pre", "", text), make("div", "facelora-row facelora-end", close))
  close.addEventListener("click", () => dialog.close())
  openDialog(dialog)
})
const languages = Object.assign(make("select", "", option("en", "English"), option("zh", "中文")), { value: language, ariaLabel: "Language" })
languages.addEventListener("change", () => {
  localStorage.setItem(LANGUAGE, languages.value)
  location.reload()
})
header.append(machine, languages)
addEventListener("hashchange", () => {
  problem.textContent = ""
  refreshSoon()
})
await attempt(async () => {
  setupForm.offer(await ask("setup"))
  await refresh()
})
let lost = false
setInterval(async () => {
  if (document.hidden) return
  try {
    await refresh()
    if (lost) problem.textContent = ""
    lost = false
  } catch ({ message }) {
    lost = true
    problem.textContent = message
  }
}, 1000)
