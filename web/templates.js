/** The templates of this pack in the order of their numbers: ComfyUI lists them as they happen to lie on the disk. */

import { api } from "../../scripts/api.js"

const pack = decodeURIComponent(new URL(".", import.meta.url).pathname.split("/").at(-2))
const asTheyLie = api.getWorkflowTemplates

api.getWorkflowTemplates = async function () {
  const templates = await asTheyLie.apply(this, arguments)
  templates[pack]?.sort()
  return templates
}
