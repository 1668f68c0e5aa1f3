/* What process 1 of a function sandbox does between two calls, in C: worker.py's `_serve` is the same in Python.
 *
 * A page that is touched after a fork is copied, and an interpreter that runs a loop touches 48 of them; this touches a few of
 * its stack and its library. It is loaded into the interpreter, forks it, and returns in the fork, to be the next call.
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdbool.h>
#include <stdint.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

enum { FORK = 0, LEFT = 1, OVER = 2 }; /* what is returned; or minus the error of a fork that failed */

struct scheduling {
    unsigned char attributes[56], processors[1024];
    long priority;
};

static void look(struct scheduling *found) {
    memset(found, 0, sizeof *found);
    syscall(SYS_sched_getattr, 0, found->attributes, sizeof found->attributes, 0);
    syscall(SYS_sched_getaffinity, 0, sizeof found->processors, found->processors);
    found->priority = syscall(SYS_ioprio_get, 1, 0);
}

static bool empty(const char *place) {
    char entries[1024];
    int directory = open(place, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    long length = -1;
    bool found = false;
    while (directory >= 0 && !found && (length = syscall(SYS_getdents64, directory, entries, sizeof entries)) > 0)
        for (long at = 0; at < length; at += ((struct dirent64 *)(entries + at))->d_reclen) {
            const char *name = ((struct dirent64 *)(entries + at))->d_name;
            found |= strcmp(name, ".") && strcmp(name, "..");
        }
    if (directory >= 0) close(directory);
    return length == 0 && !found;
}

/* The wait status of a fork; everything is killed when the other side has had enough of this call. */
static int see_to_its_end(pid_t child, unsigned number, int control) {
    struct pollfd polled[2] = {{(int)syscall(SYS_pidfd_open, child, 0), POLLIN, 0}, {control, POLLIN, 0}};
    unsigned char word[2];
    int status = 0;
    if (polled[0].fd < 0) _exit(1);
    for (;;) {
        if (poll(polled, 2, -1) < 0) continue;
        if (polled[0].revents) break;
        if (recv(control, word, sizeof word, 0) != sizeof word) _exit(0); /* nobody waits for anything any more */
        if (word[1] == number) kill(-1, SIGKILL); /* and not the call before, which had just ended */
    }
    close(polled[0].fd);
    while (waitpid(child, &status, 0) < 0 && errno == EINTR) {}
    return status;
}

static void tell(int control, const void *word, size_t length) {
    if (send(control, word, length, MSG_NOSIGNAL) != (ssize_t)length) _exit(0);
}

/* Serve calls until one leaves something (LEFT: the caller cleans up and calls again) or what cannot be undone (OVER), and in
 * every fork (FORK). `places` are the writable ones, each with its NUL, then another; `memory` keeps `struct scheduling` and
 * the number of the call from one time to the next, and is zero at first. */
int serve(int control, int calls, const char *places, unsigned char *memory, size_t size) {
    struct scheduling now;
    if (size < sizeof now + 2) return -EINVAL;
    unsigned char *begun = memory + sizeof now, *number = begun + 1;
    if (!*begun) {
        look(&now);
        memcpy(memory, &now, sizeof now);
        *begun = 1;
    }
    for (;;) {
        struct pollfd unread = {calls, POLLIN, 0}; /* its fork died before it began */
        look(&now);
        if (poll(&unread, 1, 0) != 0 || memcmp(&now, memory, sizeof now)) return OVER;
        ++*number;
        pid_t child = fork();
        if (child <= 0) return child == 0 ? FORK : -errno;
        tell(control, "r", 1);
        int status = see_to_its_end(child, *number, control);
        kill(-1, SIGKILL); /* one call is served at a time, so all others of this namespace are its own */
        while (waitpid(-1, NULL, 0) >= 0 || errno == EINTR) {}
        unsigned char word[5] = {'e', status, status >> 8, status >> 16, status >> 24};
        tell(control, word, sizeof word);
        for (const char *place = places; *place; place += strlen(place) + 1)
            if (!empty(place)) return LEFT;
    }
}
