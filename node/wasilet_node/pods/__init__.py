"""Pods: watch, one worker a pod, status. Every module here is level-triggered: it compares, it never replays."""
