/* The process that sits in a container's control groups and starts what runs in it: see seat.py, whose other side this is.
 *
 *     seat PARENT IDLE GROUP...      descriptor 3: the socket on which requests come
 *
 * GROUP is FLAGS:DIRECTORY; the flags: 2 version 2, t its subgroups keep track of commands, m it counts memory kills.
 *
 * It is outside of the container's namespaces and inside its limits. A command is a fork of it that enters the namespaces,
 * gives up every right and becomes the command; between the fork and that it cannot be traced or read by the tenant, and
 * holds no descriptor but its own. It allocates nothing that depends on what a tenant does.
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/capability.h>
#include <linux/filter.h>
#include <linux/sched.h>
#include <linux/seccomp.h>
#include <poll.h>
#include <sched.h>
#include <signal.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <termios.h>
#include <time.h>
#include <unistd.h>

#define CONTROL 3
#define JOBS 256        /* commands and sessions of one container at once */
#define TRACKERS 4      /* subgroups that are kept for the next commands */
#define DESCRIPTORS 8   /* of one request */
#define GRACE 4500      /* milliseconds that killed processes may take to be gone */
#define INSIDE (CLONE_NEWUSER | CLONE_NEWNS | CLONE_NEWNET | CLONE_NEWIPC | CLONE_NEWUTS | CLONE_NEWCGROUP)
#ifndef MOVE_MOUNT_F_EMPTY_PATH
#define MOVE_MOUNT_F_EMPTY_PATH 4
#endif

enum { SESSION_PTY = 1, IN_BACKGROUND = 2 };

struct orders {             /* what a memory file begins with; strings follow, then the filter */
    uint32_t tenant, flags;
    uint64_t open_files, file_size;
    uint32_t places, argc, envc, filter, strings, unused;
};

struct report {
    int32_t status;         /* as waitpid gives it */
    uint8_t memory_killed, stuck, died, unused;
};

struct tracker {            /* a subgroup in which one command at a time is */
    int directory, events;  /* events: -1 without version 2 */
    char name[32];
};

struct job {
    bool used, ended, killing, asked, tracked;
    char letter;
    pid_t process;
    int pidfd, channel, status;
    struct tracker tracker;
    long kills, deadline;
};

static struct {
    struct job jobs[JOBS];
    struct tracker free[TRACKERS];
    int frees, count, active;
    int tracker, memory, container; /* directories, and the pidfd of the container's process 1; -1: none */
    bool version2, asked, protected;
    char memory_file[24], killable[16]; /* killable: oom_score_adj as it was */
    bool *dying;                    /* by job, shared with its fork: the container was ending when it was to be entered */
} self = {.tracker = -1, .memory = -1, .container = -1, .asked = true};

static long now(void) {
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return time.tv_sec * 1000 + time.tv_nsec / 1000000;
}

static bool put(int directory, const char *name, const char *text) {
    int file = openat(directory, name, O_WRONLY | O_CLOEXEC);
    if (file < 0) return false;
    bool done = write(file, text, strlen(text)) == (ssize_t)strlen(text);
    close(file);
    return done;
}

static ssize_t get(int directory, const char *name, char *text, size_t most) {
    int file = openat(directory, name, O_RDONLY | O_CLOEXEC);
    if (file < 0) return -1;
    ssize_t length = read(file, text, most - 1);
    close(file);
    text[length < 0 ? 0 : length] = 0;
    return length;
}

/* -- groups */

static void enter_groups(char **specifications) {
    for (; *specifications; specifications++) {
        char *flags = *specifications, *path = strchr(flags, ':') + 1;
        if (mkdir(path, 0755) && errno != EEXIST) goto failed;
        int directory = open(path, O_PATH | O_DIRECTORY | O_CLOEXEC);
        if (directory < 0 || !put(directory, "cgroup.procs", "0")) goto failed;
        bool version2 = memchr(flags, '2', path - flags), keep = false;
        if (memchr(flags, 't', path - flags)) self.tracker = directory, self.version2 = version2, keep = true;
        if (memchr(flags, 'm', path - flags)) {
            self.memory = directory, keep = true;
            strcpy(self.memory_file, version2 ? "memory.events" : "memory.oom_control");
        }
        if (!keep) close(directory);
        continue;
    failed:
        dprintf(2, "seat: %s: %s\n", path, strerror(errno));
        _exit(1);
    }
}

static long memory_kills(void) {
    char text[512], *line;
    if (self.memory < 0 || get(self.memory, self.memory_file, text, sizeof text) <= 0) return 0;
    line = strstr(text, "oom_kill ");
    return line ? atol(line + 9) : 0;
}

static bool new_tracker(struct tracker *made) {
    if (self.frees) return *made = self.free[--self.frees], true;
    do snprintf(made->name, sizeof made->name, "r%d-%d", (int)getpid(), self.count++);
    while (mkdirat(self.tracker, made->name, 0755) && errno == EEXIST);
    made->events = -1;
    made->directory = openat(self.tracker, made->name, O_PATH | O_DIRECTORY | O_CLOEXEC);
    if (made->directory < 0) return false;
    if (self.version2) made->events = openat(made->directory, "cgroup.events", O_RDONLY | O_CLOEXEC);
    if (!self.version2 || made->events >= 0) return true;
    close(made->directory);
    return false;
}

static void end_tracker(struct tracker *one) {
    close(one->directory);
    if (one->events >= 0) close(one->events);
    unlinkat(self.tracker, one->name, AT_REMOVEDIR);
}

/* Whether nothing is left in a tracker; with version 1, what is left is killed on the way. */
static bool empty(struct tracker *one, bool kill_it) {
    char text[4096];
    if (one->events >= 0) {
        ssize_t length = pread(one->events, text, sizeof text - 1, 0);
        if (length <= 0) return true; /* it has been removed: by who ends the container */
        text[length] = 0;
        return strstr(text, "populated 0") != NULL;
    }
    if (get(one->directory, "cgroup.procs", text, sizeof text) <= 0) return true;
    for (char *at = text; kill_it && *at; at = strchr(at, '\n') + 1) {
        if (!strchr(at, '\n')) break; /* cut off: the next round has it */
        kill(atoi(at), SIGKILL);
    }
    if (kill_it) put(one->directory, "freezer.state", "THAWED");
    return false;
}

/* Without groups nobody keeps track: whatever runs in the container but its process 1 ends, sessions too. */
static void kill_namespace(void) {
    pid_t child = self.container < 0 ? -1 : fork();
    if (child == 0) {
        if (getppid() == 0) kill(-1, SIGKILL); /* our parent cannot be seen: this is the container's namespace */
        _exit(0);
    }
    if (child > 0) waitpid(child, NULL, 0);
}

static void kill_job(struct job *job) {
    if (!job->killing) job->deadline = now() + GRACE;
    job->killing = true;
    if (job->tracked && self.version2) put(job->tracker.directory, "cgroup.kill", "1");
    else if (job->tracked) empty(&job->tracker, true);
    if (!job->ended) syscall(SYS_pidfd_send_signal, job->pidfd, SIGKILL, NULL, 0);
}

/* -- in a fork: become something */

static _Noreturn void refuse(const char *why) {
    dprintf(2, "sandbox: the command could not be started: %s\n", why);
    _exit(125);
}

static void must(bool done, const char *what) {
    if (done) return;
    char text[256];
    snprintf(text, sizeof text, "%s: %s", what, strerror(errno));
    refuse(text);
}

/* Give up every right of the namespaces that were entered, now and after any exec. */
static void become(uint32_t tenant) {
    struct __user_cap_header_struct header = {_LINUX_CAPABILITY_VERSION_3, 0};
    struct __user_cap_data_struct nothing[2] = {{0}};
    for (int one = 0; one < 64; one++)
        if (prctl(PR_CAPBSET_DROP, one, 0, 0, 0)) break; /* past the last that the kernel has */
    prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0);
    /* An ordinary user's namespace forbids it to everybody; that user's groups then stay. */
    must(!syscall(SYS_setgroups, 0, NULL) || errno == EPERM, "setgroups");
    must(!syscall(SYS_setresgid, tenant, tenant, tenant), "setresgid");
    must(!syscall(SYS_setresuid, tenant, tenant, tenant), "setresuid");
    must(!syscall(SYS_capset, &header, nothing), "capset");
    must(!prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "no_new_privs");
    must(!prctl(PR_SET_DUMPABLE, 0, 0, 0, 0), "dumpable");
}

static void limit(int which, rlim_t value) {
    struct rlimit found;
    must(!getrlimit(which, &found), "getrlimit");
    if (found.rlim_max != RLIM_INFINITY && value > found.rlim_max) value = found.rlim_max;
    found.rlim_cur = found.rlim_max = value;
    must(!setrlimit(which, &found), "setrlimit");
}

static _Noreturn void execute(char **argv, char **environment) {
    const char *path = "/bin:/usr/bin", *name = argv[0];
    char place[4096];
    int error = 0, last = ENOENT;
    if (strchr(name, '/')) execve(name, argv, environment), error = errno;
    else {
        for (char **one = environment; *one; one++)
            if (!strncmp(*one, "PATH=", 5)) path = *one + 5;
        for (const char *end = path; end; path = end + 1) {
            end = strchr(path, ':');
            int length = end ? (int)(end - path) : (int)strlen(path);
            if (snprintf(place, sizeof place, "%.*s%s%s", length, path, length ? "/" : "", name) >= (int)sizeof place)
                errno = ENAMETOOLONG;
            else execve(place, argv, environment);
            last = errno;
            if (errno != ENOENT && errno != ENOTDIR && !error) error = errno;
            if (!end) break;
        }
        if (!error) error = last;
    }
    dprintf(2, "%s: %s\n", name, strerror(error));
    _exit(error == ENOENT ? 127 : 126);
}

static void terminal(int client) {
    int unlocked = 0, master = open("/dev/ptmx", O_RDWR | O_NOCTTY | O_CLOEXEC);
    must(master >= 0 && !ioctl(master, TIOCSPTLCK, &unlocked), "/dev/ptmx");
    int slave = ioctl(master, TIOCGPTPEER, O_RDWR | O_NOCTTY);
    must(slave >= 0 && !ioctl(slave, TIOCSCTTY, 0), "terminal");
    struct iovec mark = {"t", 1};
    union { struct cmsghdr header; char room[CMSG_SPACE(sizeof(int))]; } passed = {{0}};
    struct msghdr message = {.msg_iov = &mark, .msg_iovlen = 1, .msg_control = &passed, .msg_controllen = sizeof passed};
    passed.header.cmsg_level = SOL_SOCKET, passed.header.cmsg_type = SCM_RIGHTS;
    passed.header.cmsg_len = CMSG_LEN(sizeof(int));
    memcpy(CMSG_DATA(&passed.header), &master, sizeof master);
    must(sendmsg(client, &message, MSG_NOSIGNAL) == 1, "terminal");
    for (int target = 0; target < 3; target++) must(dup2(slave, target) >= 0, "dup2");
}

static void pipes(int client) {
    int ends[2];
    must(!socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, ends), "socketpair");
    struct iovec mark = {"t", 1};
    union { struct cmsghdr header; char room[CMSG_SPACE(sizeof(int))]; } passed = {{0}};
    struct msghdr message = {.msg_iov = &mark, .msg_iovlen = 1, .msg_control = &passed, .msg_controllen = sizeof passed};
    passed.header.cmsg_level = SOL_SOCKET, passed.header.cmsg_type = SCM_RIGHTS;
    passed.header.cmsg_len = CMSG_LEN(sizeof(int));
    memcpy(CMSG_DATA(&passed.header), &ends[0], sizeof ends[0]);
    must(sendmsg(client, &message, MSG_NOSIGNAL) == 1, "pipes");
    for (int target = 0; target < 3; target++) must(dup2(ends[1], target) >= 0, "dup2");
}

/* crun in a copy of the small mount namespace, with what the container needs of ours moved there. Descriptors from 4 on: the
 * orders, the program, the namespace, and a tree for each place after the first, which is the log. */
static _Noreturn void become_crun(struct orders *orders, char **places, char **argv, char **environment) {
    int log = open(places[0], O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
    int nothing = memfd_create("nothing", MFD_CLOEXEC); /* crun gives its streams to the container's root: no file of the host */
    if (dup2(nothing, 0) < 0 || dup2(log, 1) < 0 || dup2(log, 2) < 0) _exit(125);
    must(!setns(6, CLONE_NEWNS) && !unshare(CLONE_NEWNS), "mount namespace");
    for (uint32_t tree = 1; tree < orders->places; tree++)
        must(!syscall(SYS_move_mount, 6 + tree, "", AT_FDCWD, places[tree], MOVE_MOUNT_F_EMPTY_PATH), places[tree]);
    if (orders->flags & IN_BACKGROUND) setpriority(PRIO_PROCESS, 0, 15);
    fcntl(5, F_SETFD, FD_CLOEXEC);
    close_range(6, ~0u, CLOSE_RANGE_CLOEXEC);
    syscall(SYS_execveat, 5, "", argv, environment, AT_EMPTY_PATH);
    must(false, "crun");
    _exit(125);
}

static _Noreturn void become_command(char letter, struct orders *orders, char **places, char **argv, char **environment,
                                     bool *dying) {
    struct sock_fprog filter = {orders->filter / 8, (void *)((char *)(orders + 1) + orders->strings)};
    setsid();
    if (setns(CONTROL, INSIDE)) {
        if (errno == ESRCH) *dying = true, refuse("the container has died");
        must(false, "setns");
    }
    become(orders->tenant);
    if (letter == 's') (orders->flags & SESSION_PTY ? terminal : pipes)(5);
    close_range(3, ~0u, 0);
    limit(RLIMIT_NOFILE, orders->open_files);
    limit(RLIMIT_CORE, 0);
    limit(RLIMIT_FSIZE, orders->file_size);
    umask(022);
    must(!chdir(places[0]), places[0]);
    must(!prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &filter, 0, 0), "seccomp");
    execute(argv, environment);
}

static struct orders *read_orders(int file) {
    struct stat found;
    must(!fstat(file, &found) && found.st_size >= (off_t)sizeof(struct orders), "orders");
    struct orders *orders = mmap(NULL, found.st_size, PROT_READ | PROT_WRITE, MAP_PRIVATE, file, 0);
    must(orders != MAP_FAILED, "orders");
    if ((uint64_t)found.st_size != sizeof *orders + orders->strings + orders->filter) refuse("the orders are cut off");
    return orders;
}

/* In the fork. Descriptors: channel and orders, then what the letter needs. */
static _Noreturn void start(char letter, int *given, int count, struct tracker *tracker, bool *dying) {
    if (letter == 'r')
        for (int target = 0; target < 3; target++) must(dup2(given[2 + target], target) >= 0, "dup2");
    if (tracker && !self.version2) must(put(tracker->directory, "cgroup.procs", "0"), "cgroup");
    if (self.protected) put(AT_FDCWD, "/proc/self/oom_score_adj", self.killable);
    int moved[DESCRIPTORS + 1];
    moved[0] = letter == 'c' ? given[1] : self.container, moved[1] = given[1];
    int kept = 2;
    for (int one = letter == 'r' ? count : 2; one < count; one++) moved[kept++] = given[one];
    for (int one = 0; one < kept; one++) must((moved[one] = fcntl(moved[one], F_DUPFD_CLOEXEC, 1000)) >= 0, "descriptors");
    for (int one = 0; one < kept; one++) must(dup3(moved[one], CONTROL + one, O_CLOEXEC) >= 0, "descriptors");
    close_range(CONTROL + kept, ~0u, 0);
    signal(SIGPIPE, SIG_DFL), signal(SIGXFSZ, SIG_DFL);
    struct orders *orders = read_orders(CONTROL + 1);
    uint32_t total = orders->places + orders->argc + orders->envc;
    char **words = malloc((total + 3) * sizeof *words), *at = (char *)(orders + 1), *end = at + orders->strings;
    must(words != NULL && total < (1 << 22), "orders");
    char **fill = words;
    for (uint32_t one = 0; one < total; one++) {
        if (one == orders->places || one == orders->places + orders->argc) *fill++ = NULL;
        *fill++ = at;
        at += at < end ? strnlen(at, end - at) + 1 : 0;
        if (at > end) refuse("the orders are cut off");
    }
    if (!orders->envc) *fill++ = NULL;
    *fill = NULL;
    char **argv = words + orders->places + 1, **environment = argv + orders->argc + 1;
    if (letter == 'c') become_crun(orders, words, argv, environment);
    become_command(letter, orders, words, argv, environment, dying);
}

/* -- requests */

static pid_t fork_into(int group, int *pidfd) {
    struct clone_args arguments = {.flags = CLONE_PIDFD, .pidfd = (uintptr_t)pidfd, .exit_signal = SIGCHLD};
    if (group >= 0) arguments.flags |= CLONE_INTO_CGROUP, arguments.cgroup = group;
    return syscall(SYS_clone3, &arguments, sizeof arguments);
}

static void answer(int channel, char mark, const char *text) {
    char said[256];
    int length = snprintf(said, sizeof said, "%c%s", mark, text);
    send(channel, said, length < (int)sizeof said ? length : (int)sizeof said - 1, MSG_NOSIGNAL);
}

/* Whether process 1 has ended, or has begun to: it then has a number, but no namespaces that could be entered. */
static bool container_died(void) {
    char name[48], text[1024], *at;
    long process = 0, flags = 0;
    if (self.container < 0) return false;
    snprintf(name, sizeof name, "/proc/self/fdinfo/%d", self.container);
    if (get(AT_FDCWD, name, text, sizeof text) > 0 && (at = strstr(text, "\nPid:"))) process = atol(at + 5);
    snprintf(name, sizeof name, "/proc/%ld/stat", process);
    if (process <= 0 || get(AT_FDCWD, name, text, sizeof text) <= 0 || !(at = strrchr(text, ')'))) return true;
    for (int field = 2; field < 9 && at; field++) at = strchr(at + 1, ' '); /* from the name's end to the flags */
    if (at) flags = atol(at);
    return flags & 4; /* PF_EXITING, also of one that waits to be collected */
}

static void begin(char letter, int *given, int count) {
    struct job *job = self.jobs;
    while (job < self.jobs + JOBS && job->used) job++;
    if (job == self.jobs + JOBS) return answer(given[0], 'e', "too many commands run in the container");
    if (letter != 'c' && container_died()) return answer(given[0], 'd', "");
    *job = (struct job){.used = true, .letter = letter, .channel = given[0], .pidfd = -1};
    job->tracked = self.tracker >= 0 && letter != 'c';
    if (job->tracked && !new_tracker(&job->tracker)) job->used = false;
    bool *dying = &self.dying[job - self.jobs];
    *dying = false;
    if (job->used) {
        job->kills = memory_kills();
        job->process = fork_into(job->tracked && self.version2 ? job->tracker.directory : -1, &job->pidfd);
        if (job->process == 0) start(letter, given, count, job->tracked ? &job->tracker : NULL, dying);
        if (job->process < 0) {
            int error = errno;
            if (job->tracked) end_tracker(&job->tracker);
            job->used = false, errno = error;
        }
    }
    if (!job->used) { /* a container that is ending takes no process any more */
        int error = errno;
        return letter != 'c' && container_died() ? answer(given[0], 'd', "") : answer(given[0], 'e', strerror(error));
    }
    self.active++;
    given[0] = -1;
    answer(job->channel, 'p', job->tracked ? job->tracker.name : "");
}

static void know_container(int pidfd) {
    if (self.container >= 0) close(self.container);
    self.container = fcntl(pidfd, F_DUPFD_CLOEXEC, 4);
    setns(self.container, CLONE_NEWPID); /* if it has died, the next request is told so */
}

/* False when there will be no more requests. */
static bool hear(void) {
    char letter[16];
    int given[DESCRIPTORS], count = 0;
    struct iovec text = {letter, sizeof letter};
    union { struct cmsghdr header; char room[CMSG_SPACE(sizeof given)]; } passed;
    struct msghdr message = {.msg_iov = &text, .msg_iovlen = 1, .msg_control = &passed, .msg_controllen = sizeof passed};
    ssize_t length = recvmsg(CONTROL, &message, MSG_CMSG_CLOEXEC | MSG_DONTWAIT);
    if (length < 0) return errno == EAGAIN || errno == EINTR;
    struct cmsghdr *header = CMSG_FIRSTHDR(&message);
    if (header && header->cmsg_level == SOL_SOCKET && header->cmsg_type == SCM_RIGHTS) {
        count = (header->cmsg_len - CMSG_LEN(0)) / sizeof(int);
        memcpy(given, CMSG_DATA(header), count * sizeof(int));
    }
    int needed = *letter == 'r' ? 5 : *letter == 's' ? 3 : *letter == 'c' ? 4 : 1;
    if (length > 0 && count >= needed && !(message.msg_flags & MSG_CTRUNC)) {
        if (*letter == 'w') know_container(given[0]);
        else if (strchr("rsc", *letter)) begin(*letter, given, count);
    }
    for (int one = 0; one < count; one++)
        if (given[one] >= 0) close(given[one]);
    return length > 0;
}

static void finish(struct job *job) {
    struct report report = {.status = job->status, .stuck = job->killing && now() >= job->deadline};
    report.memory_killed = memory_kills() > job->kills;
    report.died = job->letter != 'c' && (self.dying[job - self.jobs] || container_died());
    send(job->channel, &report, sizeof report, MSG_NOSIGNAL);
    close(job->channel);
    close(job->pidfd);
    /* A fork into a group in which everything was once killed is killed, too, by some kernels (6.14 and newer). */
    if (job->tracked && self.frees < TRACKERS && self.version2 && !job->killing) self.free[self.frees++] = job->tracker;
    else if (job->tracked) end_tracker(&job->tracker);
    job->used = false;
    self.active--;
}

/* Whatever a command has left is killed when it has ended, and then its end is told. */
static void settle(struct job *job) {
    if (job->ended && !job->tracked) {
        if (job->letter != 'c') kill_namespace();
        return finish(job);
    }
    if (job->ended && empty(&job->tracker, false)) return finish(job);
    if (!job->ended && !job->killing) return;
    if (job->killing && now() >= job->deadline) {
        if (!job->ended) job->status = SIGKILL;
        return finish(job);
    }
    if (!job->killing || !self.version2) kill_job(job);
}

static void look(struct job *job, short ended, short asked) {
    int status;
    if (ended && !job->ended && waitpid(job->process, &status, WNOHANG) == job->process)
        job->status = status, job->ended = true;
    if (asked && !job->asked) job->asked = true, kill_job(job);
    settle(job);
}

static void turn(long idle) {
    static struct pollfd polled[2 * JOBS + 1];
    static struct job *whose[JOBS];
    int count = 0;
    bool hurry = false;
    polled[0] = (struct pollfd){self.asked ? CONTROL : -1, POLLIN, 0};
    for (struct job *job = self.jobs; count < self.active && job < self.jobs + JOBS; job++) {
        if (!job->used) continue;
        polled[1 + 2 * count] = (struct pollfd){job->ended ? -1 : job->pidfd, POLLIN, 0};
        polled[2 + 2 * count] = (struct pollfd){job->asked ? -1 : job->channel, POLLIN | POLLRDHUP, 0};
        whose[count++] = job;
        hurry |= job->killing;
    }
    int found = poll(polled, 1 + 2 * count, hurry ? 1 : count || self.container < 0 ? -1 : idle);
    if (found == 0 && !count && self.asked) shutdown(CONTROL, SHUT_RD); /* nobody's request is lost: the next is refused */
    for (int one = 0; one < count; one++) look(whose[one], polled[1 + 2 * one].revents, polled[2 + 2 * one].revents);
    if (polled[0].revents) self.asked = hear();
}

int main(int count, char **given) {
    if (count < 3) return 2;
    prctl(PR_SET_PDEATHSIG, SIGKILL); /* without the keeper nobody sees to limits and endings */
    if (getppid() != atoi(given[1])) return 1;
    long idle = atol(given[2]);
    prctl(PR_SET_NAME, "seat");
    self.protected = get(AT_FDCWD, "/proc/self/oom_score_adj", self.killable, sizeof self.killable) > 0;
    /* At the memory limit the kernel takes the tenant's processes first. */
    self.protected = self.protected && put(AT_FDCWD, "/proc/self/oom_score_adj", "-1000");
    self.dying = mmap(NULL, JOBS, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    if (self.dying == MAP_FAILED) return 1;
    enter_groups(given + 3);
    prctl(PR_SET_DUMPABLE, 0, 0, 0, 0);
    for (int one = 0; one < count; one++) memset(given[one], 0, strlen(given[one])); /* a tenant sees our forks */
    while (self.asked || self.active) turn(idle);
    while (self.frees) end_tracker(&self.free[--self.frees]);
    return 0;
}
