/* Process 1 of a virtual machine: starts commands for the host and gives it files, over one virtio-serial port. Started as
 * "agent gvisor", process 1 of a gVisor sandbox, with the channel as stdin: gvisor.h.
 *
 * The tenant lives in namespaces and a control group of its own, as user 1000 without a capability, behind the same system
 * call filter as in a container. This program holds no descriptor that the tenant could reach, runs nothing of the tenant's,
 * and allocates a bounded amount for each stream. What it sends is still only a claim: the host checks every frame.
 *
 * A frame: u32 size of the payload, u8 type, 3 bytes zero, u32 stream, payload. Little-endian. guest_link.py is the other side.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/capability.h>
#include <linux/filter.h>
#include <linux/fs.h>
#include <linux/openat2.h>
#include <linux/random.h>
#include <linux/seccomp.h>
#include <net/if.h>
#include <poll.h>
#include <sched.h>
#include <signal.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mount.h>
#include <sys/prctl.h>
#include <sys/reboot.h>
#include <sys/resource.h>
#include <sys/signalfd.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/sysmacros.h>
#include <sys/time.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <sys/xattr.h>
#include <termios.h>
#include <time.h>
#include <unistd.h>

#define VERSION 1
#define PIECE 65536                 /* most bytes of one frame's payload */
#define WINDOW (256 * 1024)         /* bytes that may be under way in one direction of a stream */
#define STREAMS 64                  /* commands, sessions, transfers and connections at once */
#define CONNECTIONS 48              /* of those, to the proxy */
#define REQUEST (4 * 1024 * 1024)   /* most bytes of a command's words */
#define TENANT 1000
#define DEEPEST 512
#define GRACE 5000                  /* milliseconds that killed processes may take to be gone */

enum { CONFIGURE = 1, SPAWN, SPAWN_PART, DATA, END, KILL, CREDIT, RESIZE, REFRESH, HOLD, GO_ON, ADJUST,
       HELLO = 16, READY, OUT, ERR, EXIT, TAKEN, OPEN, FAILED, REFRESHED };
enum { EXECUTE, READ_FILE, WRITE_FILE, LIST, UPLOAD, DOWNLOAD, PACK, WALK };
enum { DISCARD = 1 };

struct frame { uint32_t size; uint8_t type, zero[3]; uint32_t stream; };

struct stream {
    uint32_t id;
    bool used, pty, connection, packing, in_done, ended, dying, discard, stuck;
    pid_t pid;
    int in, out, err, group, status;
    uint32_t credit[2];             /* for stdout and stderr */
    uint8_t *waiting;               /* stdin that the program has not taken yet */
    size_t waiting_size;
    int64_t began, killed;
    uint64_t oom;
};

static struct {
    int port, signals, init, listener;
    struct sock_fprog filter;
    uint64_t disk, open_files;
    const char *own;                /* where a disk of the machine's own is mounted, if it has one */
    bool ready, held;          /* held: nothing is said or begun until the host goes on: a copy is being made */
    bool gvisor;
    const char *groups, *upper, *terminals; /* where they are: a group for each stream, what was changed, devpts */
} self = {.port = -1, .init = -1, .listener = -1,
          .groups = "/sys/fs/cgroup/tenant", .upper = "/upper/fs", .terminals = "/root/dev/pts"};
static struct stream streams[STREAMS];
static uint8_t *outgoing;
static size_t outgoing_size, outgoing_room;
static uint8_t *request;            /* the words of a command that comes in parts */
static size_t request_size;
static uint32_t next_connection = 0x80000000u;

/* -- small things */

static int64_t now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1000 + t.tv_nsec / 1000000;
}

static int put_text(const char *path, const char *text) {
    int file = open(path, O_WRONLY | O_CLOEXEC);
    if (file < 0) return -1;
    ssize_t done = write(file, text, strlen(text));
    close(file);
    return done < 0 ? -1 : 0;
}

static ssize_t get_text(const char *path, char *text, size_t room) {
    int file = open(path, O_RDONLY | O_CLOEXEC);
    if (file < 0) return -1;
    ssize_t size = read(file, text, room - 1);
    close(file);
    text[size < 0 ? 0 : size] = 0;
    return size;
}

static void emit(uint8_t type, uint32_t stream, const void *data, size_t size) {
    size_t need = outgoing_size + sizeof(struct frame) + size;
    if (need > outgoing_room) {
        outgoing_room = need + PIECE;
        if (!(outgoing = realloc(outgoing, outgoing_room))) abort();
    }
    struct frame head = {.size = size, .type = type, .stream = stream};
    memcpy(outgoing + outgoing_size, &head, sizeof head);
    memcpy(outgoing + outgoing_size + sizeof head, data, size);
    outgoing_size = need;
}

static void say(uint8_t type, uint32_t stream, const char *form, ...) {
    char text[512];
    va_list words;
    va_start(words, form);
    int size = vsnprintf(text, sizeof text, form, words);
    va_end(words);
    emit(type, stream, text, size < (int)sizeof text ? size : (int)sizeof text - 1);
}

static void flush(void) {
    size_t sent = 0;
    while (sent < outgoing_size) {
        ssize_t count = write(self.port, outgoing + sent, outgoing_size - sent);
        if (count <= 0) break;
        sent += count;
    }
    memmove(outgoing, outgoing + sent, outgoing_size - sent);
    outgoing_size -= sent;
}

/* -- the machine */

static void load_modules(void) {
    char list[4096], path[256];
    if (get_text("/modules/list", list, sizeof list) < 0) return;
    for (char *name = strtok(list, "\n"); name; name = strtok(NULL, "\n")) {
        snprintf(path, sizeof path, "/modules/%s", name);
        int file = open(path, O_RDONLY | O_CLOEXEC);
        if (file < 0 || (syscall(SYS_finit_module, file, "", 0) && errno != EEXIST)) dprintf(2, "module %s: %m\n", name);
        if (file >= 0) close(file);
    }
}

static void mount_early(void) {
    mkdir("/dev", 0755), mkdir("/proc", 0755), mkdir("/sys", 0755);
    mount("dev", "/dev", "devtmpfs", 0, NULL);
    mount("proc", "/proc", "proc", 0, NULL);
    mount("sys", "/sys", "sysfs", 0, NULL);
    mount("cgroup", "/sys/fs/cgroup", "cgroup2", 0, NULL);
}

/* The port whose name is ours, under /dev when the driver has found it. */
static int find_port(void) {
    char path[512], name[64];
    for (int turn = 0; turn < 20000; turn++) {
        DIR *ports = opendir("/sys/class/virtio-ports");
        struct dirent *entry;
        while (ports && (entry = readdir(ports))) {
            snprintf(path, sizeof path, "/sys/class/virtio-ports/%s/name", entry->d_name);
            if (entry->d_name[0] == '.' || get_text(path, name, sizeof name) < 0 || strncmp(name, "nautile", 7)) continue;
            snprintf(path, sizeof path, "/dev/%s", entry->d_name);
            int port = open(path, O_RDWR | O_NONBLOCK | O_CLOEXEC);
            if (port >= 0) { closedir(ports); return port; }
        }
        if (ports) closedir(ports);
        usleep(500);
    }
    return -1;
}

/* The block device with a serial number, or -1. */
static int find_disk(const char *serial, char *path, size_t room) {
    char place[300], text[64];
    DIR *blocks = opendir("/sys/block");
    struct dirent *entry;
    while (blocks && (entry = readdir(blocks))) {
        snprintf(place, sizeof place, "/sys/block/%s/serial", entry->d_name);
        if (get_text(place, text, sizeof text) <= 0) continue;
        text[strcspn(text, "\n")] = 0;
        if (!strcmp(text, serial)) {
            snprintf(path, room, "/dev/%s", entry->d_name);
            closedir(blocks);
            return 0;
        }
    }
    if (blocks) closedir(blocks);
    return -1;
}

static void set_clock_and_entropy(const char *seconds, const char *entropy) {
    if (*seconds) {
        struct timeval t = {atoll(seconds), 0};
        settimeofday(&t, NULL);
    }
    struct { struct rand_pool_info info; uint8_t room[64]; } pool;
    size_t size = strlen(entropy) < 64 ? strlen(entropy) : 64;
    pool.info.entropy_count = size * 4; /* hexadecimal digits */
    pool.info.buf_size = size;
    memcpy(pool.info.buf, entropy, size);
    int random = open("/dev/urandom", O_RDWR | O_CLOEXEC);
    if (size) ioctl(random, RNDADDENTROPY, &pool), ioctl(random, RNDRESEEDCRNG, 0);
    close(random);
}

/* -- the tenant's surroundings */

static const char *fail_step;
#define TRY(step) do { if ((step) < 0) { fail_step = #step; return -1; } } while (0)

struct plan {
    const char *memory, *pids, *disk, *inodes, *open_files, *layers, *own, *proxy, *seconds, *entropy, *hostname, *boot_id;
    const char *masked[96], *bound[16];
    int masks, binds;
};

/* A disk with a system on it: the whole disk or its first partition that can be mounted. */
static int mount_system(void) {
    char device[300], part[320];
    TRY(find_disk("own", device, sizeof device));
    for (int number = 0; number < 16; number++) {
        snprintf(part, sizeof part, number ? "%s%d" : "%s", device, number);
        if (!mount(part, "/root", "ext4", MS_NODEV | MS_NOSUID | MS_NOATIME, NULL)) {
            self.own = "/root";
            return 0;
        }
    }
    return -1;
}

static int mount_root(const struct plan *plan) {
    char device[300], lower[2048] = "", options[4096];
    mkdir("/layers", 0700), mkdir("/upper", 0700), mkdir("/root", 0755);
    if (atoi(plan->own) == 2) return mount_system();
    for (int number = atoi(plan->layers) - 1; number >= 0; number--) {
        char serial[32], place[64];
        snprintf(serial, sizeof serial, "layer%d", number);
        snprintf(place, sizeof place, "/layers/%d", number);
        mkdir(place, 0700);
        TRY(find_disk(serial, device, sizeof device));
        TRY(mount(device, place, "erofs", MS_RDONLY | MS_NODEV | MS_NOSUID, NULL));
        snprintf(lower + strlen(lower), sizeof lower - strlen(lower), "%s%s", *lower ? ":" : "", place);
    }
    if (atoi(plan->own)) {
        TRY(find_disk("own", device, sizeof device));
        TRY(mount(device, "/upper", "ext4", MS_NODEV | MS_NOSUID | MS_NOATIME, NULL));
        self.own = "/upper";
    } else {
        snprintf(options, sizeof options, "size=%s,nr_inodes=%s,mode=0700", plan->disk, plan->inodes);
        TRY(mount("upper", "/upper", "tmpfs", MS_NODEV | MS_NOSUID, options));
    }
    mkdir("/upper/fs", 0755), mkdir("/upper/work", 0755);
    snprintf(options, sizeof options, "lowerdir=%s,upperdir=/upper/fs,workdir=/upper/work", lower);
    TRY(mount("overlay", "/root", "overlay", MS_NODEV | MS_NOSUID, options));
    return 0;
}

/* What a tenant needs of any system. */
static int furnish(void) {
    const char *needed[] = {"/root/dev", "/root/proc", "/root/tmp", "/root/workspace"};
    for (int i = 0; i < 4; i++)
        if (!mkdir(needed[i], 0755) && i == 3) TRY(chown(needed[i], TENANT, TENANT));
    return 0;
}

static int node(const char *name, int minor) {
    char path[64];
    snprintf(path, sizeof path, "/root/dev/%s", name);
    TRY(mknod(path, S_IFCHR | 0666, makedev(strcmp(name, "tty") && strcmp(name, "ptmx") ? 1 : 5, minor)));
    return chmod(path, 0666);
}

static int mount_devices(const struct plan *plan) {
    char options[128];
    TRY(mount("dev", "/root/dev", "tmpfs", MS_NOSUID | MS_STRICTATIME, "mode=755,size=65536"));
    TRY(node("null", 3)); TRY(node("zero", 5)); TRY(node("full", 7));
    TRY(node("random", 8)); TRY(node("urandom", 9)); TRY(node("tty", 0));
    mkdir("/root/dev/pts", 0755), mkdir("/root/dev/shm", 01777);
    TRY(mount("pts", "/root/dev/pts", "devpts", MS_NOSUID | MS_NOEXEC, "newinstance,ptmxmode=0666,mode=0620"));
    snprintf(options, sizeof options, "size=%s,nr_inodes=4096,mode=1777", plan->disk);
    TRY(mount("shm", "/root/dev/shm", "tmpfs", MS_NOSUID | MS_NODEV | MS_NOEXEC, options));
    TRY(symlink("pts/ptmx", "/root/dev/ptmx")); TRY(symlink("/proc/self/fd", "/root/dev/fd"));
    TRY(symlink("/proc/self/fd/0", "/root/dev/stdin")); TRY(symlink("/proc/self/fd/1", "/root/dev/stdout"));
    TRY(symlink("/proc/self/fd/2", "/root/dev/stderr"));
    TRY(mount(NULL, "/root/dev", NULL, MS_REMOUNT | MS_RDONLY | MS_NOSUID | MS_STRICTATIME, "mode=755,size=65536"));
    return 0;
}

static int make_groups(void) {
    TRY(put_text("/sys/fs/cgroup/cgroup.subtree_control", "+memory +pids"));
    TRY(mkdir("/sys/fs/cgroup/tenant", 0755));
    TRY(mkdir("/sys/fs/cgroup/tenant/init", 0755));
    return 0;
}

/* What differs between two machines that have booted alike: limits, randomness, time, names. */
static int adjust(const struct plan *plan) {
    char options[128];
    self.disk = strtoull(plan->disk, NULL, 10), self.open_files = strtoull(plan->open_files, NULL, 10);
    set_clock_and_entropy(plan->seconds, plan->entropy);
    TRY(put_text("/sys/fs/cgroup/tenant/memory.max", plan->memory));
    snprintf(options, sizeof options, "%d", atoi(plan->pids) + 1);
    TRY(put_text("/sys/fs/cgroup/tenant/pids.max", options));
    snprintf(options, sizeof options, "size=%s,nr_inodes=%s", plan->disk, plan->inodes);
    if (!self.own) TRY(mount(NULL, "/upper", NULL, MS_REMOUNT | MS_NODEV | MS_NOSUID, options));
    snprintf(options, sizeof options, "size=%s,nr_inodes=4096", plan->disk);
    TRY(mount(NULL, "/root/dev/shm", NULL, MS_REMOUNT | MS_NOSUID | MS_NODEV | MS_NOEXEC, options));
    int file = open("/identity/boot_id", O_WRONLY | O_TRUNC | O_CREAT | O_CLOEXEC, 0444);
    dprintf(file, "%s\n", plan->boot_id); /* two machines from one snapshot must not have the same */
    close(file);
    return 0;
}

static void drop_capabilities(void) {
    for (int one = 0; one < 64 && !prctl(PR_CAPBSET_DROP, one, 0, 0, 0); one++) {}
    prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0);
    struct __user_cap_header_struct head = {_LINUX_CAPABILITY_VERSION_3, 0};
    struct __user_cap_data_struct none[2] = {{0}};
    syscall(SYS_capset, &head, none);
    prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0);
}

static void mask(const char *path) {
    struct stat found;
    if (stat(path, &found)) return;
    if (S_ISDIR(found.st_mode)) mount("none", path, "tmpfs", MS_RDONLY, "size=4096");
    else if (!mount("/dev/null", path, NULL, MS_BIND, NULL)) /* without devices: it cannot even be opened */
        mount(NULL, path, NULL, MS_BIND | MS_REMOUNT | MS_RDONLY | MS_NODEV | MS_NOSUID | MS_NOEXEC, NULL);
}

/* Process 1 of the tenant's namespaces: makes them habitable, then only collects orphans. */
static int inner(const struct plan *plan, int told) {
    struct ifreq loopback = {.ifr_name = "lo", .ifr_flags = IFF_UP};
    int control = socket(AF_INET, SOCK_DGRAM, 0);
    int identity = open("/identity/boot_id", O_PATH | O_CLOEXEC);
    char place[64];
    TRY(put_text("/sys/fs/cgroup/tenant/init/cgroup.procs", "0"));
    TRY(ioctl(control, SIOCSIFFLAGS, &loopback));
    TRY(sethostname(plan->hostname, strlen(plan->hostname)));
    TRY(mount(NULL, "/", NULL, MS_REC | MS_PRIVATE, NULL));
    TRY(chdir("/root"));
    TRY(mount(".", "/", NULL, MS_MOVE, NULL));
    TRY(chroot("."));
    TRY(chdir("/"));
    TRY(mount("proc", "/proc", "proc", MS_NOSUID | MS_NODEV | MS_NOEXEC, NULL));
    for (int i = 0; i < plan->masks; i++) mask(plan->masked[i]);
    snprintf(place, sizeof place, "/proc/self/fd/%d", identity);
    mount(place, "/proc/sys/kernel/random/boot_id", NULL, MS_BIND, NULL);
    TRY(mount("/proc/sys", "/proc/sys", NULL, MS_BIND | MS_REC, NULL));
    TRY(mount(NULL, "/proc/sys", NULL, MS_BIND | MS_REMOUNT | MS_RDONLY | MS_NOSUID | MS_NODEV | MS_NOEXEC, NULL));
    if (write(told, "ok", 2) != 2) return -1;
    close_range(0, ~0u, 0);
    signal(SIGCHLD, SIG_IGN);
    prctl(PR_SET_DUMPABLE, 0, 0, 0, 0);
    drop_capabilities();
    for (;;) pause();
}

static int listen_for_proxy(void) {
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons(3128), .sin_addr = {htonl(INADDR_LOOPBACK)}};
    int own = open("/proc/self/ns/net", O_RDONLY | O_CLOEXEC);
    TRY(setns(self.init, CLONE_NEWNET));
    self.listener = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    TRY(bind(self.listener, (void *)&address, sizeof address));
    TRY(listen(self.listener, 64));
    TRY(setns(own, CLONE_NEWNET));
    close(own);
    return 0;
}

static int start_inner(const struct plan *plan) {
    int told[2];
    char answer[256] = "";
    TRY(pipe2(told, O_CLOEXEC));
    unsigned long flags = CLONE_NEWPID | CLONE_NEWNS | CLONE_NEWNET | CLONE_NEWIPC | CLONE_NEWUTS | SIGCHLD;
    pid_t child = syscall(SYS_clone, flags, 0, 0, 0, 0);
    TRY(child);
    if (!child) {
        sigset_t none;
        sigemptyset(&none);
        sigprocmask(SIG_SETMASK, &none, NULL);
        inner(plan, told[1]);
        dprintf(told[1], "%s: %s", fail_step, strerror(errno));
        _exit(1);
    }
    close(told[1]);
    ssize_t size = read(told[0], answer, sizeof answer - 1);
    close(told[0]);
    if (size != 2 || strcmp(answer, "ok")) {
        fail_step = strdup(*answer ? answer : "the first process of the tenant died");
        return -1;
    }
    TRY(self.init = syscall(SYS_pidfd_open, child, 0));
    TRY(setns(self.init, CLONE_NEWPID)); /* for our children from here on */
    if (atoi(plan->proxy)) return listen_for_proxy();
    return 0;
}

/* The payload: name=value, each ended by a NUL; last "filter=" and the program of the system call filter. */
static int read_plan(char *data, size_t size, struct plan *plan) {
    *plan = (struct plan){"0", "64", "0", "0", "1024", "1", "0", "0", "", "", "sandbox", "", {0}, {0}, 0, 0};
    struct { const char *name, **value; } fields[] = {
        {"memory", &plan->memory}, {"pids", &plan->pids}, {"disk", &plan->disk}, {"inodes", &plan->inodes},
        {"open_files", &plan->open_files}, {"layers", &plan->layers}, {"own", &plan->own}, {"proxy", &plan->proxy},
        {"seconds", &plan->seconds}, {"entropy", &plan->entropy}, {"hostname", &plan->hostname},
        {"boot_id", &plan->boot_id}};
    for (char *at = data, *end = data + size; at < end;) {
        if (!strncmp(at, "filter=", 7)) {
            size_t bytes = end - at - 7;
            self.filter.len = bytes / sizeof(struct sock_filter);
            if (!(self.filter.filter = malloc(bytes + 1))) return -1;
            memcpy(self.filter.filter, at + 7, bytes);
            return 0;
        }
        char *stop = memchr(at, 0, end - at), *equals = strchr(at, '=');
        if (!stop || !equals) return -1;
        *equals = 0;
        for (size_t i = 0; i < sizeof fields / sizeof *fields; i++)
            if (!strcmp(at, fields[i].name)) *fields[i].value = equals + 1;
        if (!strcmp(at, "mask") && plan->masks < 96) plan->masked[plan->masks++] = equals + 1;
        if (!strcmp(at, "bind") && plan->binds < 16) plan->bound[plan->binds++] = equals + 1;
        at = stop + 1;
    }
    return 0;
}

#include "gvisor.h"

static int configure(char *data, size_t size) {
    struct plan plan;
    TRY(read_plan(data, size, &plan));
    if (self.gvisor) return gvisor_configure(&plan);
    put_text("/proc/sys/user/max_user_namespaces", "0");
    put_text("/proc/sys/kernel/modules_disabled", "1");
    put_text("/proc/sys/kernel/kptr_restrict", "2");
    put_text("/proc/sys/kernel/dmesg_restrict", "1");
    put_text("/proc/sys/vm/overcommit_memory", "1"); /* the control group is the limit, as on the host */
    put_text("/proc/self/oom_score_adj", "-1000");
    mkdir("/identity", 0700);
    TRY(mount("identity", "/identity", "tmpfs", MS_NODEV | MS_NOSUID, "size=4096,mode=0700"));
    TRY(make_groups());
    TRY(mount_root(&plan));
    TRY(furnish());
    TRY(mount_devices(&plan));
    TRY(adjust(&plan));
    return start_inner(&plan);
}

/* -- inside: what runs as the tenant */

static int step_inside(int group) {
    if (self.gvisor) return gvisor_step_inside(group);
    TRY(write(group, "0", 1));
    TRY(setns(self.init, CLONE_NEWNS | CLONE_NEWNET | CLONE_NEWIPC | CLONE_NEWUTS));
    sigset_t none;
    sigemptyset(&none);
    sigprocmask(SIG_SETMASK, &none, NULL);
    put_text("/proc/self/oom_score_adj", "0");
    return 0;
}

static int become_tenant(void) {
    TRY(syscall(SYS_setgroups, 0, NULL));
    TRY(setresgid(TENANT, TENANT, TENANT));
    for (int one = 0; one < 64 && !prctl(PR_CAPBSET_DROP, one, 0, 0, 0); one++) {}
    TRY(setresuid(TENANT, TENANT, TENANT));
    drop_capabilities();
    return 0;
}

static void limit(int what, uint64_t value) {
    struct rlimit both = {value, value};
    setrlimit(what, &both);
}

static void execute(char **argv, char **environment) {
    const char *path = "/usr/bin:/bin";
    int reason = ENOENT;
    for (char **one = environment; *one; one++)
        if (!strncmp(*one, "PATH=", 5)) path = *one + 5;
    if (strchr(argv[0], '/')) {
        execve(argv[0], argv, environment);
        reason = errno;
    } else {
        char full[4096];
        for (const char *at = path; at; at = strchr(at, ':') ? strchr(at, ':') + 1 : NULL) {
            snprintf(full, sizeof full, "%.*s/%s", (int)strcspn(at, ":"), at, argv[0]);
            execve(full, argv, environment);
            if (errno != ENOENT && errno != ENOTDIR) reason = errno;
        }
    }
    dprintf(2, "%s: %s\n", argv[0], strerror(reason));
    _exit(reason == ENOENT ? 127 : 126);
}

static _Noreturn void run_program(char **words, uint32_t argc, uint32_t envc, bool pty) {
    limit(RLIMIT_NOFILE, self.open_files), limit(RLIMIT_CORE, 0), limit(RLIMIT_FSIZE, self.disk);
    umask(022);
    char **argv = calloc(argc + 1, sizeof *argv), **environment = calloc(envc + 1, sizeof *environment);
    if (!argv || !environment) _exit(125);
    memcpy(argv, words + 1, argc * sizeof *argv);
    memcpy(environment, words + 1 + argc, envc * sizeof *environment);
    if (pty) ioctl(0, TIOCSCTTY, 0);
    if (chdir(*words[0] ? words[0] : "/workspace")) {
        dprintf(2, "sandbox: the command could not be started: %s: %s\n", words[0], strerror(errno));
        _exit(125);
    }
    if (self.filter.len && prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &self.filter)) _exit(125);
    execute(argv, environment);
    _exit(125);
}

/* -- files: as the tenant, beneath /, never through a link */

static _Noreturn void refuse(int code) {
    dprintf(2, "%d", code);
    _exit(3);
}

enum { NOT_PLAIN = 1001, IS_ROOT, TOO_MANY, TOO_DEEP };

static int open_beneath(int directory, const char *path, uint64_t flags) {
    struct open_how how = {.flags = flags | O_CLOEXEC, .resolve = RESOLVE_BENEATH | RESOLVE_NO_SYMLINKS | RESOLVE_NO_MAGICLINKS};
    if (self.gvisor) return open_stepwise(directory, path, flags);
    return syscall(SYS_openat2, directory, path, &how, sizeof how);
}

static void put(const void *data, size_t size) {
    for (const char *at = data; size;) {
        ssize_t count = write(1, at, size);
        if (count <= 0) _exit(4);
        at += count, size -= count;
    }
}

static bool take(void *data, size_t size, bool may_end) {
    for (char *at = data; size;) {
        ssize_t count = read(0, at, size);
        if (count <= 0) {
            if (may_end && !count && at == data) return false;
            _exit(4);
        }
        at += count, size -= count;
    }
    return true;
}

#define READING (O_RDONLY | O_NONBLOCK | O_NOCTTY | O_NOFOLLOW)

static void copy_out(int file, bool chunks) {
    static char piece[PIECE];
    ssize_t count;
    while ((count = read(file, piece, sizeof piece)) > 0) {
        uint32_t size = count;
        if (chunks) put(&size, sizeof size);
        put(piece, count);
    }
    if (count < 0) refuse(errno);
    if (chunks) put(&(uint32_t){0}, 4);
}

static void read_file(int root, const char *path) {
    struct stat found;
    int file = open_beneath(root, path, READING);
    if (file < 0) refuse(errno);
    fstat(file, &found);
    if (S_ISDIR(found.st_mode)) refuse(EISDIR);
    if (!S_ISREG(found.st_mode)) refuse(NOT_PLAIN);
    copy_out(file, false);
}

/* The directory above the last name of a path, made if need be; *name is that name. */
static int parent_of(int root, char *path, char **name) {
    int current = dup(root);
    *name = strrchr(path, '/') ? strrchr(path, '/') + 1 : path;
    if (!**name || !strcmp(*name, ".")) refuse(IS_ROOT);
    if (*name == path) return current;
    (*name)[-1] = 0;
    for (char *step = path, *stop; step; step = stop) {
        if ((stop = strchr(step, '/'))) *stop++ = 0;
        mkdirat(current, step, 0755);
        int following = open_beneath(current, step, O_PATH | O_DIRECTORY);
        if (following < 0) refuse(errno);
        close(current);
        current = following;
    }
    return current;
}

/* Write a new file beside the path and rename it: readers see the old one or the new one. ``next`` gives the pieces. */
static void store(int root, char *path, mode_t mode, ssize_t (*next)(char *, size_t)) {
    static char piece[PIECE], *name;
    char temporary[64];
    ssize_t count;
    int directory = parent_of(root, path, &name);
    snprintf(temporary, sizeof temporary, ".nautile-%d-%lld", getpid(), (long long)now());
    int file = openat(directory, temporary, O_WRONLY | O_CREAT | O_EXCL | O_NOFOLLOW | O_CLOEXEC, mode);
    if (file < 0) refuse(errno);
    while ((count = next(piece, sizeof piece)) > 0)
        for (ssize_t done = 0, part; done < count; done += part)
            if ((part = write(file, piece + done, count - done)) < 0) {
                int why = errno;
                unlinkat(directory, temporary, 0);
                refuse(why);
            }
    if (count < 0 || renameat(directory, temporary, directory, name)) {
        int why = count < 0 ? EIO : errno;
        unlinkat(directory, temporary, 0);
        refuse(why);
    }
    close(file), close(directory);
}

static ssize_t next_plain(char *piece, size_t room) { return read(0, piece, room); }

static uint32_t chunk_left;
static ssize_t next_chunk(char *piece, size_t room) {
    if (!chunk_left) {
        take(&chunk_left, sizeof chunk_left, false);
        if (!chunk_left) return 0;
    }
    size_t size = chunk_left < room ? chunk_left : room;
    take(piece, size, false);
    chunk_left -= size;
    return size;
}

static void put_entry(char kind, uint32_t mode, uint64_t size, const char *name) {
    uint32_t length = strlen(name);
    put(&kind, 1), put(&mode, 4), put(&size, 8), put(&length, 4), put(name, length);
}

static int compare(const void *one, const void *two) { return strcmp(*(char *const *)one, *(char *const *)two); }

/* The names in a directory, sorted; at most ``most``. */
static char **names_in(int directory, size_t most, size_t *count) {
    char **names = NULL;
    int copy = openat(directory, ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    DIR *open = copy < 0 ? NULL : fdopendir(copy);
    if (!open) refuse(errno);
    *count = 0;
    for (struct dirent *entry; (entry = readdir(open));) {
        if (!strcmp(entry->d_name, ".") || !strcmp(entry->d_name, "..")) continue;
        if (*count >= most) refuse(TOO_MANY);
        if (!(*count & (*count - 1)) && !(names = realloc(names, (*count ? 2 * *count : 1) * sizeof *names))) _exit(4);
        if (!(names[(*count)++] = strdup(entry->d_name))) _exit(4);
    }
    closedir(open);
    if (*count) qsort(names, *count, sizeof *names, compare);
    return names;
}

static void list(int root, const char *path) {
    struct stat found;
    size_t count;
    int directory = open_beneath(root, path, READING | O_DIRECTORY);
    if (directory < 0) refuse(errno);
    char **names = names_in(directory, 100000, &count);
    for (size_t i = 0; i < count; i++)
        if (!fstatat(directory, names[i], &found, AT_SYMLINK_NOFOLLOW)) put_entry('e', found.st_mode, found.st_size, names[i]);
}

static void upload(int root, const char *base) {
    char kind;
    while (take(&kind, 1, true)) {
        uint32_t mode, length;
        take(&mode, 4, false), take(&length, 4, false);
        if (length > 65536) refuse(ENAMETOOLONG);
        char *path = malloc(strlen(base) + length + 2), *name;
        size_t at = sprintf(path, "%s/", base);
        take(path + at, length, false);
        path[at + length] = 0;
        for (size_t end = strlen(path); end && path[end - 1] == '/';) path[--end] = 0;
        if (kind == 'd') {
            int directory = parent_of(root, path, &name);
            if (mkdirat(directory, name, mode & 0777) && errno != EEXIST) refuse(errno);
            close(directory);
        } else store(root, path, mode & 0777, next_chunk);
        free(path);
    }
}

static size_t sent_entries;
static void download(int directory, const char *name, const char *relative, int depth) {
    struct stat found;
    size_t count;
    if (++sent_entries > 100000) refuse(TOO_MANY);
    if (depth > 64) refuse(TOO_DEEP);
    int file = open_beneath(directory, name, READING);
    if (file < 0) {
        if (!*relative || (errno != ELOOP && errno != ENXIO && errno != EACCES && errno != ENOENT)) refuse(errno);
        return put_entry('l', 0, 0, relative);
    }
    fstat(file, &found);
    if (S_ISDIR(found.st_mode)) {
        put_entry('d', found.st_mode & 0777, 0, relative);
        char **names = names_in(file, 100000, &count);
        for (size_t i = 0; i < count; i++) {
            char *below;
            if (asprintf(&below, "%s%s%s", relative, *relative ? "/" : "", names[i]) < 0) _exit(4);
            download(file, names[i], below, depth + 1);
            free(below), free(names[i]);
        }
        free(names);
    } else if (S_ISREG(found.st_mode)) {
        put_entry('f', found.st_mode & 0777, found.st_size, relative);
        copy_out(file, true);
    } else if (*relative) put_entry('l', 0, 0, relative);
    else refuse(NOT_PLAIN);
    close(file);
}

/* What the tenant has changed, as root: every name of the upper directory with all that a layer keeps. */
struct change { uint32_t mode, uid, gid, rdev; uint64_t size, inode; int64_t mtime; uint32_t links, name, target, attributes; };

/* Whether a whiteout or the mark of an opaque directory hides nothing: below a directory that hides everything (``covered``),
 * or where nothing is. gVisor makes those too. */
static bool hides_nothing(const char *relative, bool covered) {
    struct stat below;
    char path[4200];
    snprintf(path, sizeof path, "/%s", relative);
    return covered || (self.gvisor && lstat(path, &below));
}

static void pack(int directory, const char *prefix, int depth, bool covered) {
    size_t count;
    if (depth > DEEPEST) refuse(TOO_DEEP);
    char **names = names_in(directory, 10000000, &count);
    for (size_t i = 0; i < count; i++) {
        struct stat found;
        char *relative, link[4096] = "", place[64], attributes[65536], listing[65536];
        size_t used = 0;
        if (asprintf(&relative, "%s%s%s", prefix, *prefix ? "/" : "", names[i]) < 0) _exit(4);
        if (fstatat(directory, names[i], &found, AT_SYMLINK_NOFOLLOW)) refuse(errno);
        bool hides = covered;
        if (S_ISCHR(found.st_mode) && !found.st_rdev && hides_nothing(relative, covered)) {
            free(relative), free(names[i]);
            continue;
        }
        if (S_ISLNK(found.st_mode)) link[readlinkat(directory, names[i], link, sizeof link - 1)] = 0;
        int file = -1;
        if (S_ISREG(found.st_mode) || S_ISDIR(found.st_mode)) {
            if ((file = openat(directory, names[i], O_RDONLY | O_NOFOLLOW | O_CLOEXEC | O_NONBLOCK)) < 0) refuse(errno);
            ssize_t size = flistxattr(file, listing, sizeof listing);
            for (char *name = listing; size > 0 && name < listing + size; name += strlen(name) + 1) {
                bool opaque = !strcmp(name, "trusted.overlay.opaque");
                hides |= opaque;
                if (opaque ? hides_nothing(relative, covered) : strncmp(name, "user.", 5)) continue;
                uint32_t length = strlen(name) + 1, room = sizeof attributes - used;
                if (room < length + 4) refuse(E2BIG);
                ssize_t value = fgetxattr(file, name, attributes + used + length + 4, room - length - 4);
                if (value < 0) refuse(errno);
                memcpy(attributes + used, name, length);
                memcpy(attributes + used + length, &(uint32_t){value}, 4);
                used += length + 4 + value;
            }
        }
        struct change head = {found.st_mode, found.st_uid, found.st_gid, found.st_rdev, found.st_size, found.st_ino,
                              found.st_mtime, found.st_nlink, strlen(relative), strlen(link), used};
        snprintf(place, sizeof place, "%s", "c");
        put(place, 1), put(&head, sizeof head), put(relative, head.name), put(link, head.target), put(attributes, used);
        if (S_ISREG(found.st_mode)) copy_out(file, true);
        if (S_ISDIR(found.st_mode)) pack(file, relative, depth + 1, hides);
        if (file >= 0) close(file);
        free(relative), free(names[i]);
    }
    free(names);
}

/* Every plain file, directory and link below a directory with what tells whether it has changed. */
static void walk(int directory, const char *prefix, int depth) {
    struct stat found;
    size_t count;
    if (depth > 64) refuse(TOO_DEEP);
    char **names = names_in(directory, 100000, &count);
    for (size_t i = 0; i < count; i++) {
        char *relative;
        if (asprintf(&relative, "%s%s%s", prefix, *prefix ? "/" : "", names[i]) < 0) _exit(4);
        if (++sent_entries > 100000) refuse(TOO_MANY);
        if (!fstatat(directory, names[i], &found, AT_SYMLINK_NOFOLLOW)) {
            int64_t stamp = found.st_ctim.tv_sec * 1000000000ll + found.st_ctim.tv_nsec;
            put_entry('w', found.st_mode, found.st_size, relative), put(&stamp, 8);
            if (S_ISDIR(found.st_mode)) {
                int below = open_beneath(directory, names[i], READING | O_DIRECTORY);
                if (below >= 0) walk(below, relative, depth + 1), close(below);
            }
        }
        free(relative), free(names[i]);
    }
    free(names);
}

static _Noreturn void serve_files(uint8_t kind, char **words, uint32_t argc) {
    const char *path = words[1];
    int root = open("/", O_PATH | O_DIRECTORY | O_CLOEXEC);
    umask(0);
    signal(SIGPIPE, SIG_DFL);
    limit(RLIMIT_FSIZE, self.disk);
    signal(SIGXFSZ, SIG_IGN);
    if (kind == READ_FILE) read_file(root, path);
    if (kind == WRITE_FILE) store(root, words[1], argc > 1 ? strtoul(words[2], NULL, 8) & 0777 : 0644, next_plain);
    if (kind == LIST) list(root, path);
    if (kind == UPLOAD) upload(root, path);
    if (kind == DOWNLOAD) download(root, path, "", 0);
    if (kind == WALK) {
        int directory = open_beneath(root, path, READING | O_DIRECTORY);
        if (directory < 0) refuse(errno);
        walk(directory, "", 0);
    }
    put("z", kind == DOWNLOAD || kind == WALK ? 1 : 0);
    _exit(0);
}

/* Stop the tenant, or let it go on. */
static void freeze(bool frozen) {
    if (self.gvisor) gvisor_freeze(frozen);
    else put_text("/sys/fs/cgroup/tenant/cgroup.freeze", frozen ? "1" : "0");
}

static _Noreturn void serve_pack(void) {
    int upper = open(self.upper, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    freeze(true);
    if (upper < 0) refuse(errno);
    sync();
    pack(upper, "", 0, false);
    put("z", 1);
    _exit(0);
}

/* -- streams */

static struct stream *find(uint32_t id) {
    for (int i = 0; i < STREAMS; i++)
        if (streams[i].used && streams[i].id == id) return &streams[i];
    return NULL;
}

static struct stream *claim(uint32_t id) {
    for (int i = 0; i < STREAMS; i++)
        if (!streams[i].used) {
            streams[i] = (struct stream){.id = id, .used = true, .in = -1, .out = -1, .err = -1, .group = -1,
                                         .credit = {WINDOW, WINDOW}, .began = now()};
            return &streams[i];
        }
    return NULL;
}

static uint64_t oom_kills(void) {
    char text[512], *at;
    if (get_text("/sys/fs/cgroup/tenant/memory.events", text, sizeof text) < 0) return 0;
    return (at = strstr(text, "oom_kill ")) ? strtoull(at + 9, NULL, 10) : 0;
}

static void group_path(const struct stream *one, const char *file, char *path, size_t room) {
    snprintf(path, room, "%s/r%u/%s", self.groups, one->id, file);
}

static int open_terminal(struct stream *one, int ends[3], uint16_t rows, uint16_t columns) {
    struct winsize size = {.ws_row = rows, .ws_col = columns};
    char text[64];
    int number, unlock = 0;
    snprintf(text, sizeof text, "%s/ptmx", self.terminals);
    int master = open(text, O_RDWR | O_NOCTTY | O_CLOEXEC | O_NONBLOCK);
    TRY(master);
    ioctl(master, TIOCSPTLCK, &unlock), ioctl(master, TIOCGPTN, &number), ioctl(master, TIOCSWINSZ, &size);
    snprintf(text, sizeof text, "%s/%d", self.terminals, number);
    TRY(chown(text, TENANT, 5));
    ends[0] = open(text, O_RDWR | O_NOCTTY | O_CLOEXEC);
    TRY(ends[0]);
    ends[1] = ends[2] = ends[0];
    one->in = fcntl(master, F_DUPFD_CLOEXEC, 3), one->out = master;
    one->pty = true;
    return 0;
}

static int open_pipes(struct stream *one, int ends[3]) {
    int pair[2];
    TRY(pipe2(pair, O_CLOEXEC));
    ends[0] = pair[0], one->in = pair[1];
    TRY(pipe2(pair, O_CLOEXEC));
    ends[1] = pair[1], one->out = pair[0];
    TRY(pipe2(pair, O_CLOEXEC));
    ends[2] = pair[1], one->err = pair[0];
    fcntl(one->in, F_SETFL, O_NONBLOCK), fcntl(one->out, F_SETFL, O_NONBLOCK), fcntl(one->err, F_SETFL, O_NONBLOCK);
    return 0;
}

struct order { uint8_t kind, pty; uint16_t rows, columns, zero; uint32_t argc, envc; };

static _Noreturn void become(struct stream *one, const struct order *order, char **words, int ends[3]) {
    setsid();
    for (int i = 0; i < 3; i++) dup2(ends[i], i);
    if (order->kind == PACK) serve_pack();
    bool entered = !step_inside(one->group);
    close_range(3, INT32_MAX, 0); /* before it is the tenant, who could look at its own; gVisor takes no larger number */
    if (!entered || become_tenant()) {
        dprintf(2, "sandbox: the command could not be started: %s: %s\n", fail_step, strerror(errno));
        _exit(125);
    }
    if (order->kind != EXECUTE) serve_files(order->kind, words, order->argc);
    run_program(words, order->argc, order->envc, order->pty);
}

static int start(struct stream *one, const struct order *order, char **words) {
    char path[128];
    int ends[3] = {-1, -1, -1};
    group_path(one, "", path, sizeof path);
    TRY(mkdir(path, 0755));
    group_path(one, "cgroup.procs", path, sizeof path);
    TRY(one->group = open(path, O_WRONLY | O_CLOEXEC));
    if (order->pty) TRY(open_terminal(one, ends, order->rows, order->columns));
    else TRY(open_pipes(one, ends));
    one->oom = oom_kills(), one->packing = order->kind == PACK;
    one->pid = fork();
    if (!one->pid) become(one, order, words, ends);
    for (int i = 0; i < 3; i++)
        if (!i || ends[i] != ends[0]) close(ends[i]);
    return one->pid < 0 ? -1 : 0;
}

static void spawn(uint32_t id, const uint8_t *data, size_t size) {
    struct order order;
    struct stream *one;
    if (size < sizeof order) return say(FAILED, id, "a request without an order");
    memcpy(&order, data, sizeof order);
    size_t count = 0, wanted = (size_t)order.argc + order.envc + 1;
    if (wanted > size || !self.ready) return say(FAILED, id, "a request that is not whole");
    char **words = calloc(wanted + 1, sizeof *words);
    for (const uint8_t *at = data + sizeof order, *end = data + size; words && at < end && count < wanted;) {
        const uint8_t *stop = memchr(at, 0, end - at);
        if (!stop) break;
        words[count++] = (char *)at;
        at = stop + 1;
    }
    if (!words || count != wanted || !order.argc) say(FAILED, id, "a request that is not whole");
    else if (!(one = claim(id))) say(FAILED, id, "more than %d commands and sessions at once", STREAMS);
    else if (start(one, &order, words)) {
        say(FAILED, id, "%s: %s", fail_step, strerror(errno));
        char path[128];
        group_path(one, "", path, sizeof path);
        rmdir(path);
        for (int *file = &one->in; file <= &one->group; file++)
            if (*file >= 0) close(*file);
        one->used = false;
    }
    free(words);
}

static void kill_tree(struct stream *one, bool discard) {
    char path[128];
    one->discard |= discard;
    if (one->connection) {
        one->discard = true, one->killed = now();
        return;
    }
    group_path(one, self.gvisor ? "" : "cgroup.kill", path, sizeof path);
    if (self.gvisor) job_is_gone(path);
    else put_text(path, "1");
    if (one->pid > 0 && !one->ended) kill(one->pid, SIGKILL); /* one that has not entered its group yet, or packs */
    if (!one->killed) one->killed = now();
    one->dying = true;
}

static void shut(int *file) {
    if (*file >= 0) close(*file);
    *file = -1;
}

static bool tree_is_gone(struct stream *one) {
    char path[128], text[256];
    group_path(one, self.gvisor ? "" : "cgroup.events", path, sizeof path);
    if (self.gvisor) return job_is_gone(path);
    return get_text(path, text, sizeof text) < 0 || strstr(text, "populated 0");
}

/* Report a stream whose program has ended, whose tree is gone and whose output has been sent. */
static void finish(struct stream *one) {
    struct { int32_t code; uint8_t memory_killed, stuck, zero[2]; uint32_t milliseconds; } end = {0};
    char path[128];
    bool late = one->killed && now() - one->killed > GRACE;
    if (!one->connection && !one->ended && !(one->dying && late)) return;
    if (!one->connection && !late && !tree_is_gone(one)) return;
    if (one->discard || late) shut(&one->out), shut(&one->err);
    if (one->out >= 0 || one->err >= 0 || (one->connection && !one->discard && one->in >= 0)) return;
    shut(&one->in), shut(&one->group);
    end.code = WIFSIGNALED(one->status) ? 128 + WTERMSIG(one->status) : WEXITSTATUS(one->status);
    end.memory_killed = oom_kills() > one->oom;
    end.stuck = !one->connection && (!one->ended || !tree_is_gone(one));
    end.milliseconds = now() - one->began;
    emit(EXIT, one->id, &end, sizeof end);
    group_path(one, "", path, sizeof path);
    if (!one->connection) rmdir(path);
    free(one->waiting);
    one->used = false;
}

static void collect(void) {
    int status;
    for (pid_t pid; (pid = waitpid(-1, &status, WNOHANG)) > 0;)
        for (int i = 0; i < STREAMS; i++)
            if (streams[i].used && streams[i].pid == pid) {
                streams[i].ended = true, streams[i].status = status;
                kill_tree(&streams[i], false);
                if (streams[i].packing) freeze(false);
            }
}

/* -- pumping */

static void forward(struct stream *one, int *file, int which) {
    static uint8_t piece[PIECE];
    while (*file >= 0 && (one->credit[which] || one->discard) && outgoing_size < 4 * PIECE) {
        size_t room = one->discard || one->credit[which] > PIECE ? PIECE : one->credit[which];
        ssize_t count = read(*file, piece, room);
        if (count < 0 && (errno == EAGAIN || errno == EINTR)) return;
        if (count <= 0) { /* a terminal whose other side has closed gives EIO */
            shut(file);
            if (one->connection) emit(OUT, one->id, "", 0);
            return;
        }
        if (one->discard) continue;
        one->credit[which] -= count;
        emit(which ? ERR : OUT, one->id, piece, count);
    }
}

static void feed(struct stream *one) {
    size_t done = 0;
    while (one->in >= 0 && done < one->waiting_size) {
        ssize_t count = write(one->in, one->waiting + done, one->waiting_size - done);
        if (count < 0 && errno == EAGAIN) break;
        if (count < 0) { /* nobody reads: what comes is taken and dropped */
            shut(&one->in);
            break;
        }
        done += count;
    }
    if (one->in < 0) done = one->waiting_size;
    if (done) {
        uint32_t taken = done;
        memmove(one->waiting, one->waiting + done, one->waiting_size - done);
        one->waiting_size -= done;
        emit(TAKEN, one->id, &taken, sizeof taken);
    }
    if (one->in_done && !one->waiting_size && one->in >= 0) {
        if (one->connection) shutdown(one->in, SHUT_WR);
        if (!one->pty) shut(&one->in);
    }
}

static void take_data(struct stream *one, const uint8_t *data, size_t size) {
    if (one->waiting_size + size > WINDOW) return kill_tree(one, true); /* the host keeps to the window */
    if (!one->waiting && !(one->waiting = malloc(WINDOW))) return kill_tree(one, true);
    memcpy(one->waiting + one->waiting_size, data, size);
    one->waiting_size += size;
    feed(one);
}

static void connect_proxy(void) {
    int peer = accept4(self.listener, NULL, NULL, SOCK_CLOEXEC | SOCK_NONBLOCK);
    if (peer < 0) return;
    int open = 0;
    for (int i = 0; i < STREAMS; i++) open += streams[i].used && streams[i].connection;
    struct stream *one = open < CONNECTIONS ? claim(next_connection) : NULL;
    if (!one) { close(peer); return; }
    next_connection = next_connection == UINT32_MAX ? 0x80000000u : next_connection + 1;
    one->connection = true;
    one->in = fcntl(peer, F_DUPFD_CLOEXEC, 3), one->out = peer;
    emit(OPEN, one->id, "", 0);
}

/* Before a copy is made: what is written is on the disk, and no frame is half sent. */
static void hold(bool held) {
    int upper = self.own ? open(self.own, O_RDONLY | O_DIRECTORY | O_CLOEXEC) : -1;
    if (self.held == held) return;
    self.held = held;
    if (upper < 0) return;
    if (held) put_text("/sys/fs/cgroup/tenant/cgroup.freeze", "1"), ioctl(upper, FIFREEZE, 0);
    else ioctl(upper, FITHAW, 0), put_text("/sys/fs/cgroup/tenant/cgroup.freeze", "0");
    close(upper);
}

/* Everything of the tenant's is killed: a copy of a machine goes on with its files alone. One of a gVisor sandbox keeps its
 * processes. */
static void refresh(char *data, size_t size) {
    hold(false);
    for (int i = 0; self.gvisor && i < STREAMS; i++) {
        streams[i].discard = true; /* it goes on, and nobody hears it any more */
        if (streams[i].used && streams[i].connection) kill_tree(&streams[i], true);
    }
    if (self.gvisor) return;
    char seconds[32] = "", entropy[80] = "";
    if (size < 100) memcpy(seconds, data, size < 31 ? size : 31);
    char *space = strchr(seconds, ' ');
    if (space && size > (size_t)(space - seconds) + 1) {
        size_t digits = size - (space - seconds) - 1;
        memcpy(entropy, data + (space - seconds) + 1, digits < 64 ? digits : 64);
        *space = 0;
    }
    set_clock_and_entropy(seconds, entropy);
    for (int i = 0; i < STREAMS; i++)
        if (streams[i].used) kill_tree(&streams[i], true);
}

static void handle(const struct frame *head, uint8_t *data) {
    struct stream *one = find(head->stream);
    uint32_t number = 0;
    memcpy(&number, data, head->size < 4 ? head->size : 4);
    switch (head->type) {
    case CONFIGURE:
        if (self.ready) return say(FAILED, 0, "configured twice");
        if (configure((char *)data, head->size)) return say(FAILED, 0, "%s: %s", fail_step, strerror(errno));
        self.ready = true;
        return emit(READY, 0, "", 0);
    case SPAWN_PART: case SPAWN:
        if (request_size + head->size > REQUEST || !(request = realloc(request, request_size + head->size + 1))) {
            request_size = 0;
            return say(FAILED, head->stream, "Argument list too long");
        }
        memcpy(request + request_size, data, head->size);
        request_size += head->size;
        if (head->type == SPAWN) spawn(head->stream, request, request_size), request_size = 0;
        return;
    case REFRESH:
        refresh((char *)data, head->size);
        return emit(REFRESHED, 0, "", 0);
    case ADJUST: {
        struct plan plan;
        if (!self.ready || read_plan((char *)data, head->size, &plan) || (self.gvisor ? gvisor_adjust : adjust)(&plan))
            return say(FAILED, 0, "%s: %s", fail_step ? fail_step : "adjust", strerror(errno));
        if (!atoi(plan.proxy)) shut(&self.listener);
        return emit(READY, 0, "", 0);
    }
    case HOLD:
        hold(true);
        return emit(REFRESHED, 0, "", 0);
    case GO_ON: return hold(false);
    }
    if (!one) return; /* it has just ended */
    switch (head->type) {
    case DATA: return take_data(one, data, head->size);
    case END: one->in_done = true; return feed(one);
    case KILL: return kill_tree(one, number & DISCARD);
    case CREDIT:
        one->credit[head->size > 4 && data[4]] += number;
        return;
    case RESIZE:
        if (one->pty) ioctl(one->out, TIOCSWINSZ, &(struct winsize){.ws_row = number & 0xffff, .ws_col = number >> 16});
    }
}

static void hear(void) {
    static uint8_t buffer[sizeof(struct frame) + PIECE + 1];
    static size_t have;
    for (;;) {
        struct frame head;
        size_t want = sizeof head;
        if (have >= sizeof head) {
            memcpy(&head, buffer, sizeof head);
            if (head.size > PIECE && self.gvisor) _exit(1);
            if (head.size > PIECE) reboot(RB_AUTOBOOT); /* not our host: nothing can be trusted any more */
            want += head.size;
        }
        if (have < want) {
            ssize_t count = read(self.port, buffer + have, want - have);
            if (!count && self.gvisor) _exit(0); /* the client has ended, and so does the sandbox */
            if (count <= 0) return;
            have += count;
            continue;
        }
        buffer[want] = 0;
        have = 0;
        handle(&head, buffer + sizeof head);
    }
}

static void turn(void) {
    struct pollfd polled[3 + 3 * STREAMS];
    struct { struct stream *one; int which; } what[3 + 3 * STREAMS];
    int count = 0, wait = -1;
    polled[count++] = (struct pollfd){self.port, POLLIN | (outgoing_size ? POLLOUT : 0), 0};
    polled[count++] = (struct pollfd){self.signals, POLLIN, 0};
    polled[count++] = (struct pollfd){self.held ? -1 : self.listener, POLLIN, 0};
    bool room = outgoing_size < 4 * PIECE && !self.held;
    for (int i = 0; i < STREAMS; i++) {
        struct stream *one = &streams[i];
        if (!one->used) continue;
        if (one->killed && !self.held) wait = 2;
        for (int which = 0; which < 2; which++) {
            int file = which ? one->err : one->out;
            if (file < 0 || !room || !(one->credit[which] || one->discard)) continue;
            what[count].one = one, what[count].which = which;
            polled[count++] = (struct pollfd){file, POLLIN, 0};
        }
        if (one->in >= 0 && one->waiting_size && !self.held) {
            what[count].one = one, what[count].which = 2;
            polled[count++] = (struct pollfd){one->in, POLLOUT, 0};
        }
    }
    if (poll(polled, count, wait) < 0) return;
    if (polled[0].revents & POLLHUP && !(polled[0].revents & POLLIN)) self.gvisor ? _exit(0) : (void)usleep(1000); /* the host is away */
    for (int i = 3; i < count; i++) {
        struct stream *one = what[i].one;
        if (!polled[i].revents || !one->used) continue;
        if (what[i].which == 2) feed(one);
        else forward(one, what[i].which ? &one->err : &one->out, what[i].which);
    }
    if (polled[1].revents) {
        struct signalfd_siginfo information;
        while (read(self.signals, &information, sizeof information) > 0) {}
        collect();
    }
    if (polled[2].revents & POLLIN && !self.held) connect_proxy();
    if (polled[0].revents & POLLIN) hear();
    for (int i = 0; i < STREAMS; i++)
        if (streams[i].used && !self.held) finish(&streams[i]);
    flush();
}

int main(int argc, char **argv) {
    sigset_t caught;
    self.gvisor = argc > 1 && !strcmp(argv[1], "gvisor");
    if (getpid() == 1 && !self.gvisor) mount_early(), load_modules();
    sigemptyset(&caught), sigaddset(&caught, SIGCHLD), sigaddset(&caught, SIGPIPE);
    sigprocmask(SIG_BLOCK, &caught, NULL);
    self.signals = signalfd(-1, &caught, SFD_CLOEXEC | SFD_NONBLOCK);
    self.port = self.gvisor ? fcntl(0, F_DUPFD_CLOEXEC, 3) : find_port();
    if (self.gvisor) fcntl(self.port, F_SETFL, O_NONBLOCK);
    if (self.port < 0) {
        dprintf(2, "nautile: no port to the host\n");
        return 1;
    }
    say(HELLO, 0, "nautile agent %d", VERSION);
    for (;;) turn();
}
