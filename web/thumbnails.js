/** Thumbnails of photos in ComfyUI's input folder. */

import { api } from "../../scripts/api.js"

const thumbnails = new Map() // by names in the input folder

/** The address of a photo's thumbnail. The server sends it only to the photo's user, so an <img> can't load it directly. */
export function thumbnail(name) {
  const read = async () => {
    const answer = await api.fetchApi(`/facelora/photo?name=${encodeURIComponent(name)}`)
    return answer.ok ? URL.createObjectURL(await answer.blob()) : ""
  }
  if (!thumbnails.has(name)) thumbnails.set(name, read())
  return thumbnails.get(name)
}

/** Forgets a photo's thumbnail: another photo may get its name. */
export function forgetThumbnail(name) {
  thumbnails.get(name)?.then((address) => URL.revokeObjectURL(address))
  thumbnails.delete(name)
}
