{{- define "lumina.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 40 | trimSuffix "-" -}}
{{- end -}}

{{- define "lumina.fullname" -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride | trunc 40 | trimSuffix "-" -}}
{{- else if contains (include "lumina.name" .) .Release.Name -}}
{{- .Release.Name | trunc 40 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name (include "lumina.name" .) | trunc 40 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}

{{- define "lumina.labels" -}}
{{ include "lumina.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version }}
{{- end -}}

{{- define "lumina.selector" -}}
app.kubernetes.io/name: {{ include "lumina.name" . }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}

{{/* The image of a Dockerfile target: (dict "root" . "target" "api"). */}}
{{- define "lumina.image" -}}
{{ .root.Values.image.registry }}/lumina-{{ .target }}:{{ default .root.Chart.AppVersion .root.Values.image.tag }}
{{- end -}}

{{- define "lumina.pullSecrets" -}}
{{- with .Values.image.pullSecrets }}
imagePullSecrets:
  {{- range . }}
  - name: {{ . }}
  {{- end }}
{{- end }}
{{- end -}}

{{/* What every pod has: nobody's rights, and no token of the cluster. */}}
{{- define "lumina.podSecurity" -}}
automountServiceAccountToken: false
enableServiceLinks: false
securityContext:
  runAsNonRoot: true
  runAsUser: 10001
  runAsGroup: 10001
  fsGroup: 10001
  seccompProfile:
    type: RuntimeDefault
{{- end -}}

{{- define "lumina.containerSecurity" -}}
securityContext:
  allowPrivilegeEscalation: false
  readOnlyRootFilesystem: true
  capabilities:
    drop: [ALL]
{{- end -}}

{{/* Environment of API, workers and hooks. */}}
{{- define "lumina.env" -}}
- name: LUMINA_REDIS_URL
  {{- if .Values.redis.bundled }}
  value: redis://{{ include "lumina.fullname" . }}-redis:6379/0
  {{- else if .Values.redis.existingSecret }}
  valueFrom:
    secretKeyRef:
      name: {{ .Values.redis.existingSecret }}
      key: {{ .Values.redis.secretKey }}
  {{- else }}
  value: {{ required "redis.url or redis.existingSecret is needed where redis.bundled is false" .Values.redis.url | quote }}
  {{- end }}
- name: LUMINA_BLOB_URL
  value: {{ include "lumina.blobUrl" . }}
- name: LUMINA_DATA_DIR
  value: /tmp/lumina
- name: LUMINA_INTERNAL_HOST
  value: 0.0.0.0
- name: LUMINA_INTERNAL_PORT
  value: "8001"
{{- range $name, $value := .Values.settings }}
- name: LUMINA_{{ upper $name }}
  value: {{ $value | toString | quote }}
{{- end }}
{{- end -}}

{{/* The blob store's URL; refuses one that the pods could not share. */}}
{{- define "lumina.blobUrl" -}}
{{- if and (hasPrefix "file:" .Values.blobs.url) (not (include "lumina.blobClaim" .)) -}}
{{- fail "blobs.url: file:// is one pod's own disk, which the others cannot read: set blobs.sharedClaim.create or .existingClaim, or blobs.url to an object store such as s3://bucket/prefix" -}}
{{- end -}}
{{ .Values.blobs.url | quote }}
{{- end -}}

{{/* The claim of a shared file:// store; empty where there is none. */}}
{{- define "lumina.blobClaim" -}}
{{- if hasPrefix "file:" .Values.blobs.url -}}
{{- with .Values.blobs.sharedClaim -}}
{{- if .existingClaim -}}
{{ .existingClaim }}
{{- else if .create -}}
{{ include "lumina.fullname" $ }}-blobs
{{- end -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{- define "lumina.envFrom" -}}
{{- with .Values.blobs.existingSecret }}
envFrom:
  - secretRef:
      name: {{ . }}
{{- end }}
{{- end -}}

{{- define "lumina.volumeMounts" -}}
- name: tmp
  mountPath: /tmp
{{- if include "lumina.blobClaim" . }}
- name: blobs
  mountPath: {{ trimPrefix "file://" .Values.blobs.url }}
{{- end }}
{{- end -}}

{{- define "lumina.volumes" -}}
- name: tmp
  emptyDir: {}
{{- with include "lumina.blobClaim" . }}
- name: blobs
  persistentVolumeClaim:
    claimName: {{ . }}
{{- end }}
{{- end -}}

{{/* Pods of one component over nodes and zones: (dict "root" . "component" "api"). */}}
{{- define "lumina.spread" -}}
topologySpreadConstraints:
  {{- range list "kubernetes.io/hostname" "topology.kubernetes.io/zone" }}
  - maxSkew: 1
    topologyKey: {{ . }}
    whenUnsatisfiable: ScheduleAnyway
    labelSelector:
      matchLabels:
        {{- include "lumina.selector" $.root | nindent 8 }}
        app.kubernetes.io/component: {{ $.component }}
  {{- end }}
{{- end -}}

{{/* Give the load balancers time to forget a pod before it stops listening. */}}
{{- define "lumina.preStop" -}}
lifecycle:
  preStop:
    exec:
      command: [sleep, "5"]
{{- end -}}
