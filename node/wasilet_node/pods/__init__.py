"""Pods: watch, one worker per pod, status. Every module here is level-triggered: it compares, it never replays."""
