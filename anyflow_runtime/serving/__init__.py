"""The live view: a page on localhost that shows frames while a model makes them.

`limits` checks what a browser asks for, `rollouts` is the queue and its worker, `engine` makes the frames, `videos`
keeps the files to download, `uploads` those to begin with, `app` is the web server. Sending JSON both ways and pictures
one way, in this order:

    browser                                        server
                                                   {"type": "hello", "causal", limits and defaults}
    {"type": "start", "prompt", "steps", "seed",
     "frames", "height", "width", "guidance",
     "negative_prompt", "context",
     "context_frames"}                             {"type": "queued", "position"}, again whenever it moves up
                                                   {"type": "started", "chunks", "frames", "seed", "fps"}
    {"type": "change", "prompt", "steps",
     "guidance"}                                   {"type": "chunk", "index", "frames": n, "prompt", "steps",
                                                   "seconds"}, then n binary messages, a JPEG each
    {"type": "stop"}                               {"type": "done", "frames", "stopped", "video"}
                                                   {"type": "error", "message", "video"} if it fails
                                                   {"type": "refused", "message", "busy"} to a message that is wrong

The "context" is the token of a picture or clip whose bytes were sent before: POST /uploads answers {"token", "frames"},
or {"message"} with status 413 or 422.
"""
