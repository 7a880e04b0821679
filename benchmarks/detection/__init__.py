"""How good detectors of copies are: which there are, what they are held against, what they find at which alarms."""
