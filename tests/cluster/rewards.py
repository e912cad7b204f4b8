"""A reward in a module of its own: what is shipped is this file, and not a test with all that it imports."""


def near(prompt: str, response: str, answer: str) -> float:
    return 1.0 if answer in response else -0.1 * len(response)
