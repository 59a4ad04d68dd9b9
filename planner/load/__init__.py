"""Driving a service as its users would, after the rules of MLPerf's load generator, and telling what they would meet.

    requests    when each request comes and how long it is: by chance, from a trace, or as soon as a client is free
    client      one request to an OpenAI-compatible endpoint of this machine, and when each of its tokens came
    driving     sends them: open loop (times fixed before, whatever the service does) or closed loop (clients that wait)
    watching    memory, processors and energy meanwhile
    telling     percentiles with their intervals, rates, goodput, whether it was steady; what is said of it

Rules followed: github.com/mlcommons/inference_policies, inference_rules.adoc (scenarios server and offline, latency
from when a request was due, a minimum duration and a minimum number of requests for the percentile that is judged).
"""
