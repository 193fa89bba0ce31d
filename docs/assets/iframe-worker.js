// Browsers refuse workers to pages that are opened from disk. The search then runs in a hidden frame instead.
if (location.protocol === "file:") {
  window.Worker = class extends EventTarget {
    constructor(url) {
      super()
      const frame = document.createElement("iframe")
      frame.hidden = true
      document.body.appendChild(frame)
      const inner = (this.inner = frame.contentWindow)
      addEventListener("message", (event) => {
        if (event.source === inner) this.dispatchEvent(new MessageEvent("message", { data: event.data }))
      })
      this.loaded = new Promise((resolve) => (this.resolve = resolve))
      inner.document.open()
      inner.document.write("<body><script>postMessage = (data) => parent.dispatchEvent(" +
        "new MessageEvent('message', { data, source: window }))</script></body>")
      inner.document.close()
      const script = inner.document.createElement("script")
      script.src = url
      script.onload = this.resolve
      inner.document.body.appendChild(script)
    }
    postMessage(data) {
      this.loaded.then(() => this.inner.dispatchEvent(new MessageEvent("message", { data })))
    }
  }
}
