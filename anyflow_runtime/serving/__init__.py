"""The live view: a page on localhost that shows a causal model's frames while it makes them.

`limits` checks what a browser asks for, `rollouts` is the queue and its worker, `engine` makes the frames, `videos`
keeps the files to download, `app` is the web server. Sending JSON both ways and pictures one way, in this order:

    browser                                        server
                                                   {"type": "hello", limits and defaults}
    {"type": "start", "prompt", "steps", "seed",
     "frames", "height", "width"}                  {"type": "queued", "position"}, again whenever it moves up
                                                   {"type": "started", "chunks", "frames", "seed", "fps"}
    {"type": "change", "prompt", "steps"}          {"type": "chunk", "index", "frames": n, "prompt", "steps",
                                                   "seconds"}, then n binary messages, a JPEG each
    {"type": "stop"}                               {"type": "done", "frames", "stopped", "video"}
                                                   {"type": "error", "message", "video"} if it fails
                                                   {"type": "refused", "message", "busy"} to a message that is wrong
"""
